"""Watching a training loop: which batches, which settings, which state, for every update."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from culpa.errors import RecordError
from culpa.problem import Problem
from culpa.trajectory import resume, rng
from culpa.trajectory.chain import StepDetail
from culpa.trajectory.check import Before, Drawn, identify, prove_reproducible
from culpa.trajectory.commits import Commit, copied
from culpa.trajectory.durability import Cadence
from culpa.trajectory.guard import Budget
from culpa.trajectory.jobs import Base
from culpa.trajectory.loops import LiveLoop, Loops
from culpa.trajectory.observer import Observer
from culpa.trajectory.point import Point
from culpa.trajectory.ranks import recording
from culpa.trajectory.ranks.exchange import Exchange
from culpa.trajectory.resume import Resumption
from culpa.trajectory.rng import RandomState
from culpa.trajectory.schema import Stage
from culpa.trajectory.settings import Settings
from culpa.trajectory.snapshot import Snapshot
from culpa.trajectory.staging import Staging
from culpa.trajectory.state import State, file_size
from culpa.trajectory.writer import Writer
from culpa.tree import Slots, Tree


class Watch(Staging):
    """Watches one optimizer at a time and commits each of its updates."""

    def __init__(
        self,
        writer: Writer | Exchange,
        observer: Observer,
        settings: Settings,
        initial: State,
        resumption: Resumption | None,
        base: Base,
    ) -> None:
        self._writer = writer
        self._observer = observer
        self._problem = observer.problem
        self._losses: list[Problem] = []  # by stages, in the order of their first use
        self._settings = settings
        self._policy = settings.policy
        self._held = initial.params.keys()
        self._joining: Tree = {}  # what trains from the next update on, as it is now
        self._last = partial(State, initial.params, initial.buffers)  # after the last update
        self._kept_before = writer.kept  # by the process that recorded before this one

        self._stage: Stage | None = None
        self._explicit = False
        self._pending: list[Drawn] = []
        self._weights: tuple[float, ...] | None = None
        self._after: RandomState | None = None  # where a replay's generators are; None: elsewhere
        self._draws_elsewhere = False  # the loop draws between its forward pass and the step
        self._usual = 0  # micro-batches an update, as proved last; 0: nothing proved in this stage
        self._before: Before | None = None
        self._versions = observer.versions()
        self._comparing, self._proving = Budget(), Budget()
        self._loss = 0  # the number of the stage's problem in ``_losses``
        self._had_slots = bool(observer.optimizer.state)
        self._started = time.monotonic()
        self.training_seconds = 0.0
        self._loops = Loops()
        self._point: Point | None = None  # of the update whose batches are pending, if one was due
        self._cadence = writer if isinstance(writer, Exchange) else Cadence(settings.durability)
        self._resumption = resumption
        self._skipping = resumption is not None  # the script has yet to reach the point
        self._watching = writer.alive()  # False: the recording failed, or has ended
        self._stepped = []
        self._inside = {}
        self._with_state = []
        self._without = set()  # parameters without a gradient, of the optimizers that have stepped
        self._scale: float | None = None  # of the scaler, for the micro-batches pending
        self._discarded = 0  # of those pending, how many belong to updates that it skipped
        self._aim()
        self._stand_on(base)
        self._hooks = self._watch()

    # The loop's side: a batch arrives, the optimizer is about to step, it has stepped.

    def _arrive(
        self,
        batches: list[Any],
        weights: tuple[float, ...] | None,
        loop: LiveLoop | None,
        now: RandomState,
    ) -> None:
        if not self._watching:
            return
        if self._stepped:
            raise RecordError(self._half_made())
        self._inside.clear()  # a step that raised never ended
        if self._stage is None:
            self._begin_stage(self._free_name(), explicit=False)
        if loop is None:
            for around in self._loops.open.values():
                around.checked = False  # its batches need not be those of the updates
        if self._skipping and self._resumption is not None:
            self._reach_point(self._resumption, batches)
            now = rng.capture()
        self._look_at_scale()
        if edited := self._observer.edited_since(self._versions, forward=bool(self._pending)):
            raise RecordError(
                f"{', '.join(edited[:4])} changed between update {self._index - 1} and the next,"
                " outside of optimizer.step(). A replay could not repeat that. Make such changes"
                " before culpa.record, or leave them out while recording."
            )
        if not self._pending and self._comparing.due(self.training_seconds):
            with self._comparing.spending():
                self._observer.require_unchanged(self._last(), f"update {self._index}")
        if not self._pending and self._cadence.due(self._index):
            self._take_point(loop, now)
        # Of several at once only the first one's forward is known to begin here.
        self._pending += [(batch, None if at else now) for at, batch in enumerate(batches)]
        self._weights = weights
        self._started = time.monotonic()

    def _look_at_scale(self) -> None:
        """A scale that went down tells of gradients that overflowed: their update was skipped."""
        if self._settings.scaler is None:
            return
        scale = float(self._settings.scaler.get_scale())
        if self._scale is not None and scale < self._scale:
            self._discarded = len(self._pending)
        self._scale = scale

    def _forget_pending(self) -> None:
        """No update is made of them, unless a scaler skipped it."""
        self._look_at_scale()
        del self._pending[self._discarded :]

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if not self._pending:
            raise RecordError(
                "optimizer.step() was called, but no batch had been drawn since the update before."
                " Wrap the loader: `for batch in recorder.batches(loader)`, or the update: `with"
                " recorder.step(batch)`."
            )
        if self._had_slots and not optimizer.state:
            self._fresh = True  # the loop cleared it: a new job with the same object
        count, usual = len(self._pending), self._usual
        if self._weights is not None and count != usual:
            usual = 0  # what weights say holds of any number of them: this update is proved again
        made_of = self._observer, self._last, count, usual
        alone = recording.before_step(self._settings.partners, *made_of)
        proving = alone and self._proving.due(self.training_seconds)
        if self._fresh or proving or self._discarded or len(self._pending) != self._usual:
            last = self._observer.before(self._last(), self._joining)
            self._before = Before(last, self._fresh)

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.training_seconds += time.monotonic() - self._started
        observer, index = self._observer, self._index
        recording.after_step(self._settings.partners, observer, len(self._pending))
        after_random = rng.capture()
        detail = StepDetail(
            weights=self._weights,
            clip_grad_norm=self._settings.clip_grad_norm,
            reset=self._fresh,
            drew_randomness=any(r not in (None, after_random) for _, r in self._pending),
            evaluating=observer.evaluating(),
            without_gradient=tuple(n for n in observer.held if n in self._without),
            loss=self._loss,
            clip_grad_value=self._settings.clip_grad_value,
            loss_scale=self._scale,
            discarded=self._discarded,
        )
        hypers, hypers_json = observer.hypers_and_json()
        if self._usual == 0:
            self._measure_state()
        going_on = self._resumption is None
        after = self._camera.take(self._writer.arena if going_on else None)
        slots = observer.copied_slots() if self._policy.keep(index + 1) else None
        pending = self._pending
        if self._before is not None:
            with recording.together(self._settings.partners):
                if self._usual == 0:
                    prove_reproducible(observer, pending)
                with self._proving.spending():
                    pending, detail, ended = identify(
                        *(observer, self._before, pending, detail, hypers),
                        *(observer.after(after.state(slots)), index, self._usual),
                    )
            self._draws_elsewhere = ended != after_random
            self._usual, self._before = len(pending) - detail.discarded, None
        self._hand_over(pending, detail, hypers_json, after, slots)
        self._after, self._fresh = None if self._draws_elsewhere else after_random, False
        self._last = after.state
        self._versions, self._had_slots = observer.versions(), bool(optimizer.state)
        self._index += 1
        self._joining = {}
        self._pending, self._discarded = [], 0
        if not self._writer.alive():
            self._stop_watching()

    def _hand_over(
        self,
        pending: Sequence[Drawn],
        detail: StepDetail,
        hypers: bytes,
        after: Snapshot,
        slots: Slots | None,
    ) -> None:
        """Give the update to the writer or, if the record has it already, compare."""
        index, stage, ahead = self._index, self._stage, self._resumption
        if ahead is not None and index < ahead.num_steps:
            recording.on_first(
                self._settings.partners, lambda: ahead.check(index, after.state())
            )  # whose buffers are recorded
            self._loops.take()
            self._point = None
            if index + 1 == ahead.num_steps:
                self._resumption = None
            return
        is_kept = index == 0 or self._policy.keep(index) or index in self._kept_before
        is_kept = is_kept or recording.apart(self._settings.partners, detail)
        going_on = not is_kept and pending[0][1] == self._after
        randoms = [None if going_on and at == 0 else r for at, (_, r) in enumerate(pending)]
        arena = self._writer.arena
        encoded = [(copied(b, arena), r) for (b, _), r in zip(pending, randoms, strict=True)]
        named = Stage(self._stage_name(), index if stage is None else stage.start, index + 1)
        spec, point = self._observer.spec_json, self._point
        draws, self._point = self._loops.take(), None
        facts = (index, named, spec, hypers, encoded, detail, after, slots, draws, point)
        self._writer.submit(Commit(*facts))

    def _measure_state(self) -> None:
        """Tell the policy how large a state is, now that the optimizer has its own."""
        if sized := getattr(self._policy, "sized", None):
            size = file_size(self._observer.live_state(self._held))
            self._policy = self._writer.policy = sized(size)

    def _aim(self) -> None:
        held = {n: self._observer.params[n] for n in self._held}
        self._camera = self._observer.camera(held)

    def _last_with(self, slots: Slots) -> State:
        last = self._last()
        return State(dict(last.params), last.buffers, slots)

    def _whole_state(self) -> State:
        return self._observer.state({n: self._observer.params[n] for n in self._held}, slots=True)

    # Resuming (resume.py).

    def _take_point(self, loop: LiveLoop | None, now: RandomState) -> None:
        state, refused = resume.scheduler_state(self._settings.scheduler)
        self._point = Point(
            index=self._index,
            stage=self._stage_name(),
            random=now,
            hypers=self._observer.hypers(),
            scheduler=state,
            refused=refused,
            loops=self._loops.at_point(loop),
            next_loop=self._loops.begun,
            fresh=self._fresh,
            had_slots=self._had_slots,
            has_slots=bool(self._observer.optimizer.state),
            seconds=self.training_seconds,
        )

    def _reach_point(self, ahead: Resumption, batches: list[Any]) -> None:
        """The script arrived at the update where the record goes on."""
        point, observer = ahead.point, self._observer
        if self._loops.begun != point.next_loop or self._stage_name() != point.stage:
            raise RecordError(
                f"the resumed script makes an update in stage {self._stage_name()!r} after"
                f" {self._loops.begun} loops over batches, but update {point.index}, where the"
                f" record goes on, was made in stage {point.stage!r} after {point.next_loop}. Loops"
                " with recorder.step begin at recorder.num_steps."
            )
        if self._settings.partners is not None:
            self._settings.partners.before_going_on(ahead, observer.problem, batches[0])
        ahead.put(observer, self._settings.scheduler)
        self._index, self._skipping = point.index, False
        held = {name: ahead.state.params[name] for name in self._held}
        self._last = partial(State, held, ahead.state.buffers)
        self._fresh, self._had_slots = point.fresh, point.had_slots
        self._after, self._usual = None, 0
        self._versions = observer.versions()
        self.training_seconds = point.seconds

    def _end_loop(self, loop: LiveLoop, exhausted: bool) -> None:
        if self._watching and not self._skipping:
            end = self._loops.end(loop, self._index, exhausted, rng.capture())
            if self._resumption is None:
                self._writer.submit(end)
