"""Recording an unmodified ``transformers.Trainer``. Needs ``pip install 'culpa[transformers]'``.

    from culpa.integrations.transformers import record_trainer

    with record_trainer(trainer, "runs/llama", stage="sft"):
        trainer.train()

Everything the trainer does to a loss belongs to the loss here: the trainer's own ``training_step``
computes it (accumulation, ``num_items_in_batch``, mixed precision, label smoothing, a subclass's
``compute_loss``), up to the call of ``backward``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from culpa.errors import OptionError, ProblemError, RecordError, UnsupportedError
from culpa.integrations.attributes import replaced
from culpa.integrations.trainer_ranks import as_one_of, require_data_parallel, wrapper_of
from culpa.problem import Loss, Problem
from culpa.trajectory.record import record
from culpa.trajectory.recorder import Recorder

ITEMS, ACCUMULATION, INPUTS = "num_items_in_batch", "accumulation", "inputs"
"""What a recorded micro-batch holds: the trainer's inputs, and what its loss is divided by."""
PROCESSES = "processes"
"""And of several processes, how many: the loss of each is multiplied by that."""
_COUNTS = {torch.int64: "int64", torch.int32: "int32", torch.float32: "float32"}
"""The dtypes that ``num_items_in_batch`` has; by name they are plain values."""


def problem_of(trainer: Trainer, *, example_losses: Loss | None = None) -> Problem:
    """What the trainer minimises, as a ``culpa.Problem`` of its model.

    Args:
        trainer: built as the training script did; it need not have been trained.
        example_losses: for scores of training examples: ``(model, batch) -> [B]`` whose mean is
            the loss of the micro-batch, as the trainer divides it. ``batch["inputs"]`` is what the
            trainer's collator made, ``count_of(batch)`` the ``num_items_in_batch``, and
            ``batch["accumulation"]`` the number of micro-batches of the update.

    Raises:
        UnsupportedError: for a trainer that spreads its model over processes.
    """
    require_data_parallel(trainer)
    model = cast("nn.Module", trainer.accelerator.unwrap_model(trainer.model))
    if trainer.accelerator.native_amp and not hasattr(model, "_original_forward"):
        trainer.accelerator.prepare_model(model)  # autocast, as train() would wrap it
    # On several processes culpa.record needs what reduces their gradients; others take the model.
    return Problem(wrapper_of(trainer, model), _LossOf(trainer), example_losses)


class _LossOf:
    """The tensor on which the trainer calls ``backward`` for one recorded micro-batch."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        trainer = self.trainer
        found: list[Tensor] = []

        def keep(loss: Tensor, **_: Any) -> None:
            found.append(loss)

        if not (isinstance(batch, Mapping) and {ITEMS, ACCUMULATION, INPUTS} <= batch.keys()):
            raise ProblemError(
                "problem_of(trainer) takes batches as record_trainer records them, a dictionary"
                f" with {ITEMS}, {ACCUMULATION} and {INPUTS}; got {type(batch).__name__}."
            )
        inputs = dict(cast("Mapping[str, Any]", batch[INPUTS]))
        # Attributes of the instance hide those of its class for the time of the call.
        micro_batches = replaced(
            trainer, "current_gradient_accumulation_steps", int(batch[ACCUMULATION])
        )
        processes = as_one_of(trainer, int(batch.get(PROCESSES, 1)))
        with micro_batches, processes, replaced(trainer.accelerator, "backward", keep):
            trainer.training_step(model, inputs, count_of(batch, trainer.args.device))
        if len(found) != 1:
            raise UnsupportedError(
                f"{type(trainer).__name__}.training_step called accelerator.backward {len(found)}"
                " times for one batch; culpa records trainers that call it once."
            )
        return found[0]


def count_of(batch: Mapping[str, Any], device: torch.device | str = "cpu") -> Any:
    """The ``num_items_in_batch`` of a recorded micro-batch, as the trainer passed it.

    Returns:
        A 0-dimensional tensor, a number, or ``None``.
    """
    found = batch[ITEMS]
    if not isinstance(found, Mapping):
        return found
    count = cast("Mapping[str, Any]", found)
    dtype = {name: dtype for dtype, name in _COUNTS.items()}[count["dtype"]]
    return torch.tensor(count["value"], dtype=dtype, device=device)


def _plain(items: Any) -> Any:
    """A count as plain values: beside a tensor of no dimension, a batch's rows are no examples."""
    if isinstance(items, Tensor) and items.ndim == 0 and items.dtype in _COUNTS:
        return {"value": items.item(), "dtype": _COUNTS[items.dtype]}
    return items


@dataclass
class TrainerRecording:
    """What ``record_trainer`` yields.

    Attributes:
        path: the run folder.
        recorder: from the beginning of ``trainer.train()`` on; ``None`` before.
    """

    path: Path
    recorder: Recorder | None = None
    _stage: ExitStack = field(default_factory=ExitStack, repr=False)

    def begin_stage(self, name: str) -> None:
        """From the next update on, the updates are another stage: for callbacks of a trainer.

        Call it between two updates: in ``on_step_end`` or ``on_epoch_begin``.

        Raises:
            StageError: if the name was used, or no update was made since the stage began.
            RecordError: before training has begun.
        """
        if self.recorder is None:
            raise RecordError(
                f"begin_stage({name!r}): training has not begun; its first stage is named by"
                " record_trainer(stage=...)."
            )
        self._stage.close()
        self._stage.enter_context(self.recorder.stage(name))

    @property
    def num_steps(self) -> int:
        """Updates recorded so far."""
        return 0 if self.recorder is None else self.recorder.num_steps


@contextmanager
def record_trainer(
    trainer: Trainer, path: str | Path, *, stage: str, **options: Any
) -> Generator[TrainerRecording]:
    """Record what ``trainer.train()`` does inside, as one stage.

    Under ``torchrun`` call it on every process, with one ``path``: the first one writes.

    Args:
        trainer: any ``transformers.Trainer``, PEFT models and subclasses such as TRL's included.
        path: the run folder.
        stage: the name of the stage.
        options: of ``culpa.record``. Clipping and scheduler are the trainer's.

    Yields:
        A ``TrainerRecording``.

    Raises:
        RecordError: if nothing was trained inside, or the training does what a replay could not.
        UnsupportedError: for trainers that spread their model over processes.
        CulpaError: what ``culpa.record`` raises besides.
    """
    taken = sorted({"scheduler", "scaler", "clip_grad_norm"} & options.keys())
    if taken:
        raise OptionError(
            f"record_trainer takes {', '.join(taken)} from the trainer; leave it out."
        )
    recording = TrainerRecording(Path(path))
    require_data_parallel(trainer)
    opened = ExitStack()
    watcher = _Watcher(
        recording,
        trainer.args.world_size,
        lambda: _start(trainer, recording, opened, stage, options),
    )
    with ExitStack() as restore:
        trainer.add_callback(watcher)
        restore.callback(trainer.remove_callback, watcher)
        samples = trainer.get_batch_samples

        def get_batch_samples(*args: Any, **kwargs: Any) -> Any:
            batches, items = samples(*args, **kwargs)
            watcher.arrive(batches, items)
            return batches, items

        restore.enter_context(replaced(trainer, "get_batch_samples", get_batch_samples))
        with opened:
            yield recording
            watcher.leave_unfinished()
    if recording.recorder is None:
        raise RecordError("record_trainer: trainer.train() was not called inside.")


def _start(
    trainer: Trainer,
    recording: TrainerRecording,
    opened: ExitStack,
    stage: str,
    options: Mapping[str, Any],
) -> None:
    """The optimizer is there and no update was made: recording begins."""
    optimizer: Any = trainer.optimizer
    while hasattr(optimizer, "optimizer"):  # accelerate wraps it
        optimizer = optimizer.optimizer
    scaler = trainer.accelerator.scaler
    bound = trainer.args.max_grad_norm
    recorder = opened.enter_context(
        record(
            recording.path,
            problem_of(trainer),  # only now: with model_init, train() has made another model
            optimizer,
            scheduler=trainer.lr_scheduler,
            scaler=scaler,
            clip_grad_norm=bound if bound and bound > 0 else None,
            **options,
        )
    )
    opened.enter_context(recording._stage)  # pyright: ignore[reportPrivateUsage]
    recording.recorder = recorder
    recording.begin_stage(stage)


class _Watcher(TrainerCallback):
    """Tells the recorder where an update begins and ends."""

    def __init__(
        self, recording: TrainerRecording, processes: int, start: Callable[[], None]
    ) -> None:
        self._recording = recording
        self._processes = processes
        self._start = start
        self._drawn: tuple[list[Any], Any] = ([], None)
        self._update: Any = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Optimizer, scheduler and a resumed checkpoint are in place."""
        if self._recording.recorder is not None:
            raise RecordError(
                "record_trainer records one call of trainer.train() as one stage; use it again,"
                " with another name, for the next."
            )
        self._start()

    def arrive(self, batches: list[Any], items: Any) -> None:
        """All micro-batches of the next update were drawn."""
        self._drawn = (batches, items)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """The first forward pass follows; a resumed trainer put its generators back just now."""
        recorder, (batches, items) = self._recording.recorder, self._drawn
        if recorder is None or not batches:
            return
        self.leave_unfinished()
        facts = {ITEMS: _plain(items), ACCUMULATION: len(batches)}
        if self._processes > 1:
            facts[PROCESSES] = self._processes
        micro = [{INPUTS: dict(batch), **facts} for batch in batches]
        # training_step has divided by everything already.
        self._update = recorder.step(*micro, weights=[1.0] * len(micro))
        self._update.__enter__()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The update is made."""
        update, self._update = self._update, None
        if update is not None:
            update.__exit__(None, None, None)

    def leave_unfinished(self) -> None:
        """Training was stopped between two micro-batches."""
        update, self._update = self._update, None
        if update is not None:
            stop = GeneratorExit()
            update.__exit__(GeneratorExit, stop, None)
