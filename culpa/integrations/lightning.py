"""Recording ``lightning.Trainer.fit``. Needs ``pip install 'culpa[lightning]'``.

    from culpa.integrations.lightning import RecorderCallback

    trainer = lightning.Trainer(callbacks=[RecorderCallback("runs/head", stage="civil")], ...)
    trainer.fit(module, loader)

Automatic optimization with one optimizer, on one device or on several with ``strategy="ddp"``: what
Lightning does between ``training_step`` and ``optimizer.step`` is known then. A batch of the record
is a dictionary of the loader's batch, its index, and how many batches an update is made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from inspect import signature
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from culpa.errors import OptionError, ProblemError, RecordError, UnsupportedError
from culpa.integrations.attributes import replaced
from culpa.problem import Loss, Problem
from culpa.trajectory.record import record
from culpa.trajectory.recorder import Recorder

BATCH, INDEX, ACCUMULATION = "batch", "batch_idx", "accumulation"


def problem_of(module: LightningModule, *, example_losses: Loss | None = None) -> Problem:
    """What ``training_step`` minimises, as a ``culpa.Problem`` of the module.

    Args:
        module: built as the training script did.
        example_losses: for scores of training examples: ``(model, batch) -> [B]`` whose mean is
            the loss. ``batch["batch"]`` is the loader's batch.
    """
    if not module.automatic_optimization:
        raise UnsupportedError(
            f"{type(module).__name__} optimizes manually; record such a loop with culpa.record and"
            " recorder.step inside of training_step."
        )
    # On several processes culpa.record needs what reduces their gradients; others take the module.
    return Problem(_wrapper_of(module), _loss, example_losses)


def _wrapper_of(module: LightningModule) -> nn.Module:
    """The ``DistributedDataParallel`` around a module that is being fitted, or the module."""
    fitting: Any = module._trainer  # pyright: ignore[reportPrivateUsage]
    wrapped: Any = None if fitting is None else fitting.strategy.model
    return wrapped if isinstance(wrapped, DistributedDataParallel) else module


def _loss(model: nn.Module, batch: Any) -> Tensor:
    """The tensor on which Lightning calls ``backward``."""
    if not (isinstance(batch, Mapping) and {BATCH, INDEX, ACCUMULATION} <= batch.keys()):
        raise ProblemError(
            "problem_of(module) takes batches as RecorderCallback records them, a dictionary with"
            f" {BATCH}, {INDEX} and {ACCUMULATION}; got {type(batch).__name__}."
        )
    found = cast("Mapping[str, Any]", batch)
    module = cast("LightningModule", model)
    with ExitStack() as quiet:  # what is computed again is not logged again
        for name in ("log", "log_dict"):
            quiet.enter_context(replaced(module, name, _nothing))
        step = cast("Any", module).training_step
        # Not every training_step takes an index, nor calls it batch_idx.
        more = (found[INDEX],) if len(signature(step).parameters) > 1 else ()
        loss = step(found[BATCH], *more)
    if isinstance(loss, Mapping):
        loss = cast("Mapping[str, Any]", loss).get("loss")
    if not isinstance(loss, Tensor):
        raise UnsupportedError(
            f"{type(module).__name__}.training_step returned {type(loss).__name__} for a recorded"
            " batch; a step that skips batches cannot be modelled."
        )
    return loss / int(found[ACCUMULATION])


def _nothing(*_: Any, **__: Any) -> None:
    """Logs nothing."""


class RecorderCallback(Callback):
    """Records each ``trainer.fit`` as one stage.

    Args:
        path: the run folder; on several processes rank 0 writes it.
        stage: the name of the stage.
        options: of ``culpa.record``. Gradient clipping and the scheduler are the trainer's.

    Attributes:
        recorder: from the beginning of training on; ``None`` before.
    """

    def __init__(self, path: str | Path, *, stage: str, **options: Any) -> None:
        taken = sorted(
            {"scheduler", "scaler", "clip_grad_norm", "clip_grad_value"} & options.keys()
        )
        if taken:
            raise OptionError(
                f"RecorderCallback takes {', '.join(taken)} from the trainer; leave it out."
            )
        super().__init__()
        self.path = Path(path)
        self.stage = stage
        self.options = options
        self.recorder: Recorder | None = None
        self._open: ExitStack | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Recording begins."""
        if self.recorder is not None:
            raise RecordError(
                "a RecorderCallback records one trainer.fit; make a new one, with another stage,"
                " for the next."
            )
        _require_modelled(trainer)
        scheduler = (
            trainer.lr_scheduler_configs[0].scheduler if trainer.lr_scheduler_configs else None
        )
        self._open = ExitStack()
        recorder = self._open.enter_context(
            record(
                self.path,
                problem_of(pl_module),
                trainer.optimizers[0],
                scheduler=scheduler,
                **_clipping(trainer),
                **self.options,
            )
        )
        self._open.enter_context(recorder.stage(self.stage))
        self.recorder = recorder

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The next update is made of this batch too."""
        if self.recorder is not None:
            facts = {INDEX: batch_idx, ACCUMULATION: trainer.accumulate_grad_batches}
            self.recorder.micro_batch({BATCH: batch, **facts}, 1.0)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The record is complete."""
        self._close(None)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """The record is interrupted."""
        self._close(exception)

    def _close(self, error: BaseException | None) -> None:
        opened, self._open = self._open, None
        if opened is None:
            return
        if error is None:
            opened.close()
            return
        try:
            opened.__exit__(type(error), error, error.__traceback__)
        except BaseException as raised:
            if raised is not error:
                raise


def _clipping(trainer: Trainer) -> dict[str, Any]:
    bound = trainer.gradient_clip_val
    if not bound:
        return {}
    by_value = trainer.gradient_clip_algorithm == "value"  # an enum of strings
    return {"clip_grad_value" if by_value else "clip_grad_norm": float(bound)}


def _require_modelled(trainer: Trainer) -> None:
    strategy = trainer.strategy
    if trainer.world_size > 1 and not isinstance(strategy.model, DistributedDataParallel):
        raise UnsupportedError(
            f"the trainer runs {trainer.world_size} processes with {type(strategy).__name__};"
            " RecorderCallback records several with Trainer(strategy='ddp') only."
        )
    if len(trainer.optimizers) != 1:
        raise UnsupportedError(
            f"the module has {len(trainer.optimizers)} optimizers; RecorderCallback records one."
        )
    if len(trainer.lr_scheduler_configs) > 1:
        raise UnsupportedError("RecorderCallback records one scheduler; the module has several.")
    precision = str(trainer.precision)
    if precision not in ("32-true", "64-true"):
        raise UnsupportedError(
            f"precision {precision!r}: Lightning applies it around training_step, where a replay"
            " cannot see it. Use torch.autocast inside of training_step with precision='32-true'."
        )
