"""Recording a training loop: which batches, which settings, which state, for every update."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from culpa.errors import OptionError, RecordError, StageError, UnsupportedError
from culpa.problem import Problem
from culpa.trajectory import rng
from culpa.trajectory.batches import encode
from culpa.trajectory.chain import StepDetail
from culpa.trajectory.check import Before, identify, prove_reproducible
from culpa.trajectory.checkpoints import CheckpointPolicy
from culpa.trajectory.observer import Observer, encode_hypers
from culpa.trajectory.rng import RandomState
from culpa.trajectory.schema import Stage
from culpa.trajectory.state import State, largest_difference
from culpa.trajectory.writer import Commit, Writer

Batch = TypeVar("Batch")
UNNAMED = "training"


class Recorder:
    """Watches one optimizer at a time and commits each of its updates. Made by ``culpa.record``."""

    def __init__(
        self,
        writer: Writer,
        observer: Observer,
        clip: float | None,
        policy: CheckpointPolicy,
        initial: State,
    ) -> None:
        self._writer = writer
        self._observer = observer
        self._clip = clip
        self._policy = policy
        self._last = State(
            initial.params, initial.buffers
        )  # parameters and buffers after the last committed update
        self._held = initial.params.keys()
        self._index = 0
        self._stage: Stage | None = None
        self._names: set[str] = set()
        self._explicit = False
        self._pending: list[tuple[Any, RandomState]] = []
        self._weights: tuple[float, ...] | None = None
        self._after: RandomState | None = None
        self._usual = 0  # micro-batches an update, as proved last; 0: nothing proved in this stage
        self._before: Before | None = None
        self._versions = observer.versions()
        self._fresh = False  # whether the optimizer starts anew at the next update
        self._had_slots = bool(observer.optimizer.state)
        self._started = time.monotonic()
        self.training_seconds = 0.0
        self._hooks = self._watch()

    @contextmanager
    def stage(
        self,
        name: str,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        problem: Problem | None = None,
    ) -> Generator[None]:
        """Name the updates made inside: a stage.

        Args:
            name: unique in the run.
            optimizer: a new optimizer that takes over from here on.
            problem: a new loss on the same model. (Not in this version: refused.)

        Raises:
            StageError: if stages overlap, a name repeats, or a stage ends without an update.
        """
        if self._explicit:
            raise StageError(
                f"stage {name!r} begins inside stage {self._stage_name()!r}; stages may not"
                " overlap."
            )
        if not name or name in self._names:
            raise StageError(
                f"stage name {name!r} is {'used twice' if name else 'empty'}; names must be unique."
            )
        if problem is not None and problem is not self._observer.problem:
            raise UnsupportedError(
                f"stage {name!r} brings its own problem; this version records one loss a run. Let"
                " the loss function tell the stages apart by the batch it is given."
            )
        self._end_stage()
        if optimizer is not None and optimizer is not self._observer.optimizer:
            self._replace(optimizer)
        self._begin_stage(name, explicit=True)
        yield
        start = self._index if self._stage is None else self._stage.start
        if self._index == start:
            raise StageError(
                f"stage {name!r} ended without an update. Does its loop call step() on the"
                " optimizer given to culpa.record (or to recorder.stage(optimizer=...))?"
            )
        self._end_stage()

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yield each batch of ``loader`` unchanged, noting that the next update is made of it.

        Several batches before one update count as micro-batches, each weighted 1/n.
        """
        self._pending.clear()
        for batch in loader:
            self._arrive([batch], None)
            yield batch

    @contextmanager
    def step(self, *micro_batches: Any, weights: Iterable[float] | None = None) -> Generator[None]:
        """For loops that ``batches`` does not fit: the update made inside is made of these.

        Args:
            micro_batches: what ``loss(model, micro_batch)`` is called with inside, in order.
            weights: what each loss is multiplied by; default: each is divided by their number.
        """
        listed = None if weights is None else tuple(float(w) for w in weights)
        if not micro_batches or (listed is not None and len(listed) != len(micro_batches)):
            raise OptionError(
                "recorder.step needs at least one micro-batch and one weight each, got "
                f"{len(micro_batches)} and {0 if listed is None else len(listed)} weights."
            )
        before = self._index
        self._pending.clear()
        self._arrive(list(micro_batches), listed)
        yield
        if self._index != before + 1:
            raise RecordError(
                f"recorder.step saw {self._index - before} updates inside; it must be one."
            )

    def close(self, status: str, reason: str) -> None:
        """Finish the record. Called by ``culpa.record``."""
        for hook in self._hooks:
            hook.remove()
        self._end_stage()
        # An update that was refused has moved the live optimizer already: it ends before that one.
        slots = (
            self._before.state.slots if self._before else self._observer.state({}, slots=True).slots
        )
        final = State(self._last.params, self._last.buffers, slots)
        self._writer.close(final, status, reason, self.training_seconds)

    # The loop's side: a batch arrives, the optimizer is about to step, it has stepped.

    def _arrive(self, batches: list[Any], weights: tuple[float, ...] | None) -> None:
        if self._stage is None:
            self._begin_stage(self._free_name(), explicit=False)
        now_at = self._observer.versions()
        edited = [name for name, version in now_at.items() if version != self._versions[name]]
        if edited:
            raise RecordError(
                f"{', '.join(edited[:4])} changed between update {self._index - 1} and the next,"
                " outside of optimizer.step(). A replay could not repeat that. Make such changes"
                " before culpa.record, or leave them out while recording."
            )
        now = rng.capture()
        self._pending += [(batch, now) for batch in batches]
        self._weights = weights
        self._started = time.monotonic()

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if not self._pending:
            raise RecordError(
                "optimizer.step() was called, but no batch had been drawn since the update before."
                " Wrap the loader: `for batch in recorder.batches(loader)`, or the update: `with"
                " recorder.step(batch)`."
            )
        if self._had_slots and not optimizer.state:
            self._fresh = True  # the loop cleared it: a new job with the same object
        if self._fresh or len(self._pending) != self._usual:
            slots = self._observer.state({}, slots=True).slots
            self._before = Before(State(self._last.params, self._last.buffers, slots), self._fresh)

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.training_seconds += time.monotonic() - self._started
        observer, index = self._observer, self._index
        after_random = rng.capture()
        detail = StepDetail(
            weights=self._weights,
            clip_grad_norm=self._clip,
            reset=self._fresh,
            drew_randomness=after_random != self._pending[-1][1]
            or len({r for _, r in self._pending}) > 1,
            evaluating=observer.evaluating(),
            without_gradient=observer.without_gradient(),
        )
        hypers = observer.hypers()
        keep = self._policy.keep(index + 1)
        after = observer.state({n: observer.params[n] for n in self._held}, slots=keep)
        pending = self._pending
        if self._before is not None:
            if self._usual == 0:
                prove_reproducible(observer.problem, pending)
            pending, detail = identify(
                observer, self._before, pending, detail, hypers, after, index, self._usual
            )
            self._usual, self._before = len(self._pending), None
        kept_before = index == 0 or self._policy.keep(index)
        encoded = [
            (
                encode(batch),
                None if at == 0 and random == self._after and not kept_before else random,
            )
            for at, (batch, random) in enumerate(pending)
        ]
        self._writer.submit(
            Commit(index, observer.spec, encode_hypers(hypers), encoded, detail, after, keep)
        )
        self._after, self._fresh = after_random, False
        self._last = State(after.params, after.buffers)
        self._versions, self._had_slots = observer.versions(), bool(optimizer.state)
        self._index += 1
        self._pending = []

    # Stages.

    def _begin_stage(self, name: str, *, explicit: bool) -> None:
        self._writer.check()
        observer = self._observer
        live = observer.state({n: observer.params[n] for n in self._held}, slots=False)
        where, size = largest_difference(live.flat(), self._last.flat())
        if where:
            raise RecordError(
                f"before stage {name!r} the tensor {where} differs by up to {size:.3g} from what it"
                " was after the last update: something changed the model outside of"
                " optimizer.step(). A replay could not repeat that; record such jobs as runs of"
                " their own."
            )
        self._stage = Stage(name, self._index, self._index)
        self._names.add(name)
        self._explicit, self._usual = explicit, 0
        self._pending, self._after = [], None

    def _end_stage(self) -> None:
        if self._stage is not None and self._index > self._stage.start:
            self._writer.add_stage(Stage(self._stage.name, self._stage.start, self._index))
        self._stage, self._explicit = None, False

    def _stage_name(self) -> str:
        return "" if self._stage is None else self._stage.name

    def _free_name(self) -> str:
        numbered = (f"{UNNAMED} {i}" for i in range(2, len(self._names) + 3))
        return next(name for name in (UNNAMED, *numbered) if name not in self._names)

    def _replace(self, optimizer: torch.optim.Optimizer) -> None:
        """Another optimizer takes over: hooks move, its state counts as fresh."""
        observer = Observer(self._observer.problem, optimizer)
        outside = sorted(observer.held.keys() - self._held)
        if outside:
            raise UnsupportedError(
                f"the new optimizer trains {outside[0]!r}, which no optimizer held when recording "
                "began; this version needs every trained parameter in the first optimizer."
            )
        if observer.slots():
            raise RecordError("the new optimizer has state already; pass it before its first step.")
        for hook in self._hooks:
            hook.remove()
        self._observer, self._fresh = observer, True
        self._hooks = self._watch()
        self._versions = observer.versions()

    def _watch(self) -> list[Any]:
        optimizer = self._observer.optimizer
        return [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
