"""A trainer that trains again, watched: compared with what its first training left on the way."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import Trainer, TrainerCallback

from culpa.errors import NotReproducibleError
from culpa.integrations.trainer_checks import Check, compare, settings_of
from culpa.integrations.trainer_folder import OPTIMIZER, Saved, Weights
from culpa.integrations.transformers import TrainerRecording
from culpa.progress import Progress
from culpa.trajectory import rng


@dataclass(frozen=True)
class Plan:
    """One call of ``train()``: from which update to which, and what to compare on the way.

    Attributes:
        start, stop: updates ``[start, stop)`` of the trainer.
        names: of the stages, by the update they begin with.
        saved: all checkpoints of the folder.
        tolerance: the largest drift to accept.
        scratch: a folder for the weights as they are, removed later.
    """

    start: int
    stop: int
    names: Mapping[int, str]
    saved: Sequence[Saved]
    tolerance: float
    scratch: Path

    @property
    def ahead(self) -> list[Saved]:
        """The checkpoints to compare with."""
        return [one for one in self.saved if self.start < one.step <= self.stop]


class Again(TrainerCallback):
    """Compares at every checkpoint, names the stages, and stops where the last checkpoint is."""

    def __init__(
        self, trainer: Trainer, plan: Plan, checks: list[Check], progress: Progress
    ) -> None:
        self.recording: TrainerRecording | None = None
        self._trainer = trainer
        self._plan = plan
        self._checks = checks
        self._progress = progress
        self._ahead = plan.ahead
        self._due: Saved | None = None
        self._last = plan.start
        self._before = plan.scratch / "start"
        self._unlike: dict[str, str] = {}
        self._seeded = True

    @contextmanager
    def watching(self) -> Generator[None]:
        """Inside, the trainer tells. Before any other callback: what is refused is not recorded."""
        self._trainer.add_callback(self)
        try:
            yield
        finally:
            self._trainer.remove_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing was made yet: refuse what is another training already."""
        self._seeded = self._plan.start > 0 or _as_seeded(args.seed)
        first = self._ahead[0]
        facts = first.facts
        told: dict[str, tuple[Any, Any]] = {
            "max_steps": (facts.max_steps, state.max_steps),
            "num_train_epochs": (facts.num_train_epochs, state.num_train_epochs),
        }
        if facts.train_batch_size is not None:
            told["train_batch_size"] = (facts.train_batch_size, state.train_batch_size)
        theirs = first.loaded(OPTIMIZER)
        if theirs is not None:
            settings = settings_of(theirs), settings_of(_live(self._trainer.optimizer))
            if len(settings[0]) != len(settings[1]):
                told["groups of the optimizer"] = (len(settings[0]), len(settings[1]))
            for there, here in zip(*settings, strict=False):
                for name in sorted(there.keys() | here.keys()):
                    if there.get(name) != here.get(name):
                        told.setdefault(name, (there.get(name), here.get(name)))
        wrong = [
            f"{name} is {there} there and {here} here"
            for name, (there, here) in told.items()
            if there != here
        ]
        if wrong:
            raise NotReproducibleError(
                f"the trainer is not set up as the one that wrote {first.path}: {'; '.join(wrong)}."
                " Build it with the same arguments, model and data."
            )
        self._save_weights(self._before)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Between two updates: the one before is done with, evaluations included."""
        self._settle(generators=False)
        if self.recording is not None and state.global_step > self._plan.start:
            name = self._plan.names.get(state.global_step)
            if name is not None:
                self.recording.begin_stage(name)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An update was made."""
        self._progress.advance()
        if self._ahead and self._ahead[0].step == state.global_step:
            self._due = self._ahead.pop(0)
        if state.global_step == self._plan.stop:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare what is logged with what was, to say where the two trainings part."""
        last, logs = self._plan.saved[-1], kwargs["logs"]
        was = last.facts.logged(state.global_step)
        if "loss" not in logs or not was:
            return
        for name in ("epoch", "learning_rate", "loss"):
            there, now = was.get(name), state.epoch if name == "epoch" else logs.get(name)
            if there is None or there == now or name in self._unlike:
                continue
            self._unlike[name] = (
                f"after {state.global_step} updates the {name} was {there} there and is {now} here"
            )
            if name == "epoch":
                raise NotReproducibleError(
                    f"the trainer is not set up as the one that wrote {last.path}:"
                    f" {self._unlike[name]}. Build it with the same number of examples, batch size"
                    " and accumulation."
                )

    def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """In place of the trainer's own: compare where it would write."""
        self._settle(generators=True)

    def finish(self) -> None:
        """Training has returned."""
        self._settle(generators=False)
        if self._ahead:
            raise NotReproducibleError(
                f"training ended after {self._trainer.state.global_step} updates here, and the"
                f" original one went on to {self._ahead[-1].path}. Was it stopped by a callback, or"
                " had it more data?"
            )

    def _settle(self, *, generators: bool) -> None:
        due, self._due = self._due, None
        if due is None:
            return
        trainer = self._trainer
        here = self._plan.scratch / f"after-{due.step}"
        live = {
            "optimizer": _live(trainer.optimizer),
            "scheduler": _live(trainer.lr_scheduler),
            "scaler": _live(trainer.accelerator.scaler),
            "generators": generators,
        }
        with rng.preserved():
            self._save_weights(here)
            check = compare(due, Weights(self._before), here, live, self._last)
        for done in self._plan.scratch.iterdir():
            shutil.rmtree(done)
        self._checks.append(check)
        self._last, self._before = due.step, due.path
        allowed = self._plan.tolerance
        if check.drift > allowed or (allowed == 0 and not check.bitwise):
            raise NotReproducibleError(self._words(check, due))

    def _save_weights(self, folder: Path) -> None:
        """The weights as the trainer itself saves them."""
        self._trainer.save_model(str(folder), _internal_call=True)

    def _words(self, check: Check, saved: Saved) -> str:
        """What happened, what may be the cause, and what to do."""
        causes = list(self._unlike.values())
        if not self._seeded:
            causes.append(
                "the generators did not stand as Trainer() seeds them when training began: call"
                " from_trainer_output exactly where the script called trainer.train()"
            )
        version = saved.version()
        if version and version != transformers.__version__:
            causes.append(
                f"it was trained with transformers {version}, and {transformers.__version__} is"
                " here"
            )
        others = [f"checkpoint-{c.step}" for c in self._checks if c.bitwise]
        agreed = f" The same bit for bit until then: {', '.join(others)}." if others else ""
        kept = "" if self.recording is None else f" What was executed is in {self.recording.path}."
        return (
            f"re-execution is not the training that {saved.path} comes from. {check} (tolerance"
            f" {self._plan.tolerance:g}).{agreed}"
            + (f" Note: {'; '.join(causes)}." if causes else "")
            + " The model, the data, their order, what was drawn before, the software or the number"
            " of threads may differ; or the original was stopped and resumed at a checkpoint before"
            f" (resumed=[{check.start}]), or this one was changed.{kept} To try again:"
            " overwrite=True. To record what this trainer does all the same:"
            f" tolerance=float('inf'). To begin behind it: start={saved.step}. Without executing"
            " anything again: culpa.from_checkpoints with the weights of the checkpoints (SGD)."
        )


def _live(owner: Any) -> Any:
    """The state dict of something of the trainer's, as it would save it."""
    return None if owner is None else owner.state_dict()


def _as_seeded(seed: int) -> bool:
    """Whether the generators stand as ``Trainer()`` leaves them."""
    now = rng.capture()
    with rng.preserved():
        transformers.set_seed(seed)
        return rng.capture() == now
