"""Watching a training loop: which batches, which settings, which state, for every update."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from culpa.errors import RecordError
from culpa.trajectory import resume, rng
from culpa.trajectory.batches import encode
from culpa.trajectory.chain import StepDetail
from culpa.trajectory.check import Before, Drawn, identify, prove_reproducible
from culpa.trajectory.durability import Cadence
from culpa.trajectory.loops import LiveLoop, Loops
from culpa.trajectory.observer import Observer, encode_hypers
from culpa.trajectory.point import Point
from culpa.trajectory.resume import Resumption
from culpa.trajectory.rng import RandomState
from culpa.trajectory.schema import Stage
from culpa.trajectory.settings import Settings
from culpa.trajectory.state import State
from culpa.trajectory.store import Commit, Keep, file_size
from culpa.trajectory.writer import Writer

UNNAMED = "training"


class Watch:
    """Watches one optimizer at a time and commits each of its updates."""

    def __init__(
        self,
        writer: Writer,
        observer: Observer,
        settings: Settings,
        initial: State,
        resumption: Resumption | None,
    ) -> None:
        self._writer = writer
        self._observer = observer
        self._settings = settings
        self._policy = settings.policy
        self._last = State(initial.params, initial.buffers)  # after the last update
        self._held = initial.params.keys()
        self._kept_before = writer.kept  # by the process that recorded before this one

        self._index = 0
        self._stage: Stage | None = None
        self._names: set[str] = set()
        self._explicit = False
        self._pending: list[Drawn] = []
        self._weights: tuple[float, ...] | None = None
        self._after: RandomState | None = None  # where a replay's generators are; None: elsewhere
        self._draws_elsewhere = False  # the loop draws between its forward pass and the step
        self._usual = 0  # micro-batches an update, as proved last; 0: nothing proved in this stage
        self._before: Before | None = None
        self._versions = observer.versions()
        self._fresh = False  # whether the optimizer starts anew at the next update
        self._had_slots = bool(observer.optimizer.state)
        self._started = time.monotonic()
        self.training_seconds = 0.0
        self._loops = Loops()
        self._point: Point | None = None  # of the update whose batches are pending, if one was due
        self._cadence = Cadence(settings.durability)
        self._resumption = resumption
        self._skipping = resumption is not None  # the script has yet to reach the point
        self._watching = writer.alive()  # False: the recording failed, or has ended
        self._hooks = self._watch()

    # The loop's side: a batch arrives, the optimizer is about to step, it has stepped.

    def _arrive(
        self, batches: list[Any], weights: tuple[float, ...] | None, loop: LiveLoop | None
    ) -> None:
        if not self._watching:
            return
        if self._stage is None:
            self._begin_stage(self._free_name(), explicit=False)
        if loop is None:
            for around in self._loops.open.values():
                around.checked = False  # its batches need not be those of the updates
        if self._skipping and self._resumption is not None:
            self._reach_point(self._resumption)
        now_at = self._observer.versions()
        edited = [name for name, version in now_at.items() if version != self._versions[name]]
        if edited:
            raise RecordError(
                f"{', '.join(edited[:4])} changed between update {self._index - 1} and the next,"
                " outside of optimizer.step(). A replay could not repeat that. Make such changes"
                " before culpa.record, or leave them out while recording."
            )
        now = rng.capture()
        if not self._pending and self._cadence.due(self._index):
            self._take_point(loop, now)
        # Of several at once only the first one's forward is known to begin here.
        self._pending += [(batch, None if at else now) for at, batch in enumerate(batches)]
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
            clip_grad_norm=self._settings.clip_grad_norm,
            reset=self._fresh,
            drew_randomness=any(r not in (None, after_random) for _, r in self._pending),
            evaluating=observer.evaluating(),
            without_gradient=observer.without_gradient(),
        )
        hypers = observer.hypers()
        if self._usual == 0:
            self._measure_state()
        keep = self._policy.keep(index + 1)
        after = observer.state({n: observer.params[n] for n in self._held}, slots=keep)
        pending = self._pending
        if self._before is not None:
            if self._usual == 0:
                prove_reproducible(observer.problem, pending)
            pending, detail, ended = identify(
                observer, self._before, pending, detail, hypers, after, index, self._usual
            )
            self._draws_elsewhere = ended != after_random
            self._usual, self._before = len(self._pending), None
        self._hand_over(pending, detail, hypers, after, keep)
        self._after, self._fresh = None if self._draws_elsewhere else after_random, False
        self._last = State(after.params, after.buffers)
        self._versions, self._had_slots = observer.versions(), bool(optimizer.state)
        self._index += 1
        self._pending = []
        if not self._writer.alive():
            self._stop_watching()

    def _hand_over(
        self,
        pending: Sequence[Drawn],
        detail: StepDetail,
        hypers: tuple[dict[str, Any], ...],
        after: State,
        keep: bool,
    ) -> None:
        """Give the update to the writer or, if the record has it already, compare."""
        index, stage, ahead = self._index, self._stage, self._resumption
        if ahead is not None and index < ahead.num_steps:
            ahead.check(index, after)
            self._loops.take()
            self._point = None
            if index + 1 == ahead.num_steps:
                self._resumption = None
            return
        is_kept = index == 0 or self._policy.keep(index) or index in self._kept_before
        going_on = not is_kept and pending[0][1] == self._after
        randoms = [None if going_on and at == 0 else r for at, (_, r) in enumerate(pending)]
        encoded = [(encode(batch), r) for (batch, _), r in zip(pending, randoms, strict=True)]
        named = Stage(self._stage_name(), index if stage is None else stage.start, index + 1)
        spec, point = self._observer.spec, self._point
        draws, self._point = self._loops.take(), None
        self._writer.submit(
            Commit(
                index,
                named,
                spec,
                encode_hypers(hypers),
                encoded,
                detail,
                after,
                keep,
                draws,
                point,
            )
        )

    def _measure_state(self) -> None:
        """Tell the policy how large a state is, now that the optimizer has its own."""
        if sized := getattr(self._policy, "sized", None):
            self._policy = self._writer.policy = sized(file_size(self._whole_state()))

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

    def _reach_point(self, ahead: Resumption) -> None:
        """The script arrived at the update where the record goes on."""
        point, observer = ahead.point, self._observer
        if self._loops.begun != point.next_loop or self._stage_name() != point.stage:
            raise RecordError(
                f"the resumed script makes an update in stage {self._stage_name()!r} after"
                f" {self._loops.begun} loops over batches, but update {point.index}, where the"
                f" record goes on, was made in stage {point.stage!r} after {point.next_loop}. Loops"
                " with recorder.step begin at recorder.num_steps."
            )
        ahead.put(observer, self._settings.scheduler)
        self._index, self._skipping = point.index, False
        self._last = State(ahead.state.params, ahead.state.buffers)
        self._fresh, self._had_slots = point.fresh, point.had_slots
        self._after, self._usual = None, 0
        self._versions = observer.versions()
        self.training_seconds = point.seconds

    def _end_loop(self, loop: LiveLoop, exhausted: bool) -> None:
        if self._watching and not self._skipping:
            end = self._loops.end(loop, self._index, exhausted, rng.capture())
            if self._resumption is None:
                self._writer.submit(end)

    # Stages.

    def _begin_stage(self, name: str, *, explicit: bool) -> None:
        start = self._index
        if self._skipping and self._resumption is not None:
            start = resume.stage_of(self._resumption, name).start
        elif self._watching:
            self._observer.require_unchanged(self._last, name)
        self._stage = Stage(name, start, start)
        self._names.add(name)
        self._explicit, self._usual = explicit, 0
        self._pending, self._after = [], None

    def _end_stage(self) -> None:
        stage, ahead = self._stage, self._resumption
        self._stage, self._explicit = None, False
        if stage is None or not self._watching:
            return
        if self._skipping and ahead is not None:
            self._index = ahead.stages[stage.name].stop
            if self._index > ahead.point.index:
                raise RecordError(
                    f"stage {stage.name!r} ended before update {ahead.point.index} in it, where the"
                    " record goes on. Resume with the script and the data that were recorded."
                )
        elif (
            self._index > stage.start
            and getattr(self._policy, "at_boundary", bool)()
            and (ahead is None or self._index >= ahead.num_steps)
            and bool(self._observer.optimizer.state) == self._had_slots  # not cleared meanwhile
        ):
            self._writer.submit(Keep(self._index, self._whole_state()))

    def _stage_name(self) -> str:
        return "" if self._stage is None else self._stage.name

    def _free_name(self) -> str:
        numbered = (f"{UNNAMED} {i}" for i in range(2, len(self._names) + 3))
        return next(name for name in (UNNAMED, *numbered) if name not in self._names)

    def _replace(self, optimizer: torch.optim.Optimizer) -> None:
        """Another optimizer takes over: hooks move, its state counts as fresh."""
        if self._watching:
            observer = self._observer.followed_by(optimizer, self._held)
            for hook in self._hooks:
                hook.remove()
            self._observer, self._fresh = observer, True
            self._hooks, self._versions = self._watch(), observer.versions()

    def _watch(self) -> list[Any]:
        if not self._watching:
            return []
        live = self._observer.optimizer
        before = live.register_step_pre_hook(self._before_step)
        return [before, live.register_step_post_hook(self._after_step)]

    def _stop_watching(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._watching = [], False
