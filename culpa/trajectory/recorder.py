"""The recorder: what a training loop says of itself while it is recorded."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch.optim import Optimizer

from culpa.errors import OptionError, RecordError, StageError, UnsupportedError
from culpa.problem import Problem
from culpa.trajectory import rng
from culpa.trajectory.ranks import recording
from culpa.trajectory.together import as_one, members_of
from culpa.trajectory.watch import Watch

Batch = TypeVar("Batch")


class Recorder(Watch):
    """Watches one optimizer at a time and commits each of its updates. Made by ``culpa.record``.

    If the disk fails, the recorder stops recording and every method goes on as if nothing was.
    """

    @property
    def num_steps(self) -> int:
        """Updates that need not be made (again): where a loop with ``step`` begins to count.

        Those of earlier jobs (``culpa.record(..., append=True)``) are not among them.
        """
        ahead = self._resumption if self._skipping else None
        return (self._index if ahead is None else ahead.point.index) - self._base.index

    @contextmanager
    def stage(
        self,
        name: str,
        *,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        problem: Problem | None = None,
    ) -> Generator[None]:
        """Name the updates made inside: a stage. On resume, recorded ones pass without updates.

        Args:
            name: unique in the run.
            optimizer: a new optimizer that takes over from here on, or several.
            problem: another loss on the same module from here on. Whoever walks the run again
                needs ``culpa.Problem.by_stage``; given that to ``culpa.record``, stages find
                their problem by name, and the run can be resumed.

        Raises:
            UnsupportedError: if ``problem`` is of another module.
            ProblemError: if the problem by stages has none for this one.
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
        if problem is not None and problem.model is not self._observer.problem.model:
            raise UnsupportedError(
                f"stage {name!r} brings a problem of another module. One run is of one module: let"
                " it have from the beginning what trains later (a new head, adapters), and hand its"
                " parameters to the optimizer of that stage. If recording is over, culpa.grow makes"
                " it a run of the larger model, which culpa.record(append=True) goes on with."
            )
        self._end_stage()
        if problem is not None:
            self._problem = problem
        live = self._observer.optimizer if optimizer is None else as_one(optimizer)
        if members_of(live) == self._observer.members:
            live = self._observer.optimizer
        if live is not self._observer.optimizer or self._observer.regrouped():
            self._replace(live)
        self._begin_stage(name, explicit=True)
        yield
        start = -1 if self._stage is None else self._stage.start
        if self._watching and not self._skipping and self._index == start:
            raise StageError(
                f"stage {name!r} ended without an update. Does its loop call step() on the"
                " optimizer given to culpa.record (or to recorder.stage(optimizer=...))?"
            )
        self._end_stage()

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """Yield each batch of ``loader`` unchanged, noting that the next update is made of it.

        Several batches before one update count as micro-batches, each weighted 1/n. On resume the
        batches of recorded updates are drawn and dropped (trajectory/resume.py).
        """
        self._forget_pending()
        loop, exhausted, before = self._loops.begin(self._index), False, rng.capture()
        if self._skipping and self._resumption is not None:
            iterator, recorded = self._resumption.skip(loop.number, loader)
            loop.start, loop.draws, loop.checked = recorded.start, recorded.draws, recorded.checked
            if self._stage is None and recorded.stop > recorded.start:
                self._begin_stage(self._free_name(), explicit=False)
            self._index = recorded.stop
            if recorded.after is not None:
                del self._loops.open[loop.number]
                return
            before = rng.capture()
        else:
            iterator = iter(loader)
        try:
            while True:
                try:
                    batch = next(iterator)
                except StopIteration:
                    exhausted = True
                    return
                now = rng.capture()
                self._loops.drew(loop, before, now)
                self._arrive([batch], None, loop, now)
                yield batch
                before = rng.capture()
        finally:
            self._end_loop(loop, exhausted)

    @contextmanager
    def step(self, *micro_batches: Any, weights: Iterable[float] | None = None) -> Generator[None]:
        """For loops that ``batches`` does not fit: the update made inside is made of these.

        On resume such a loop begins at update ``recorder.num_steps``.

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
        self._forget_pending()
        self._arrive(list(micro_batches), listed, None, rng.capture())
        before = self._index
        yield
        if self._watching and self._settings.scaler is not None and self._index == before:
            return  # it skipped the update; whether it did shows when the next one begins
        if self._watching and self._index != before + 1:
            raise RecordError(
                f"recorder.step saw {self._index - before} updates inside; it must be one."
            )

    def micro_batch(self, batch: Any, weight: float | None = None) -> None:
        """For callbacks of frameworks, which see batch after batch: called before its forward.

        The next update is made of all batches announced since the update before.

        Args:
            batch: what ``loss(model, batch)`` is about to be called with.
            weight: what its loss is multiplied by; default: each is divided by their number.

        Raises:
            OptionError: if some micro-batches of an update have a weight and others have none.
        """
        self._look_at_scale()
        begun = len(self._pending) > self._discarded
        before = (self._weights or ()) if begun else ()
        if begun and (weight is None) != (self._weights is None):
            raise OptionError("give every micro-batch of an update a weight, or none of them.")
        weights = None if weight is None else (*before, float(weight))
        self._arrive([batch], weights, None, rng.capture())

    def close(self, status: str, reason: str) -> None:
        """Finish the record. Called by ``culpa.record``."""
        half_made = self._half_made() if self._stepped and status == "complete" else ""
        if half_made:
            status, reason = "interrupted", half_made
        # Of a model that is sharded a rank that failed reads nothing: the others are elsewhere.
        readable = status == "complete" or recording.alone(self._settings.partners)
        if readable and not self._skipping:
            self._end_stage()
        self._stop_watching()
        recording.stop(self._settings.partners)
        ahead = self._resumption
        if ahead is not None and self._index < ahead.num_steps:  # it did not get to anything new
            self._writer.close(None, "recording", reason, ahead.point.seconds)
            if status == "complete":
                raise RecordError(
                    f"the resumed script ended at update {self.num_steps}, but"
                    f" {ahead.num_steps - self._base.index} are recorded. Resume with the script"
                    " and the data that were recorded."
                )
            return
        # An update that was refused has moved the live optimizer already: it ends before that one.
        if self._before is not None:
            slots = self._before.state.slots if readable else {}
        else:  # of several optimizers one may have moved
            readable = readable and not self._stepped
            slots = self._observer.state({}, slots=True).slots if readable else {}
        final = self._last_with(slots)
        self._writer.close(final, status, reason, self.training_seconds)
        if half_made:
            raise RecordError(half_made)
