"""The stages of a recording: which updates, which problem and which optimizers are theirs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import Any

from torch.optim import Optimizer

from culpa.errors import RecordError
from culpa.problem import Problem
from culpa.trajectory import resume, tensors
from culpa.trajectory.check import Drawn
from culpa.trajectory.checkpoints import CheckpointPolicy
from culpa.trajectory.commits import Keep
from culpa.trajectory.jobs import Base
from culpa.trajectory.observer import Observer
from culpa.trajectory.ranks.exchange import Exchange
from culpa.trajectory.resume import Resumption
from culpa.trajectory.rng import RandomState
from culpa.trajectory.schema import FROZEN_NAME, Stage
from culpa.trajectory.state import State
from culpa.trajectory.together import Stepper
from culpa.trajectory.writer import Writer
from culpa.tree import Tree

UNNAMED = "training"


class Staging(ABC):
    """Names the updates by stages. ``Watch`` sets the attributes, and watches the updates."""

    _base: Base
    _writer: Writer | Exchange
    _observer: Observer
    _problem: Problem
    _losses: list[Problem]
    _loss: int
    _policy: CheckpointPolicy
    _held: Collection[str]
    _joining: Tree
    _last: Callable[[], State]
    _index: int
    _stage: Stage | None
    _names: set[str]
    _explicit: bool
    _pending: list[Drawn]
    _discarded: int
    _after: RandomState | None
    _usual: int
    _versions: dict[str, tuple[int, int]]
    _fresh: bool
    _had_slots: bool
    _resumption: Resumption | None
    _skipping: bool
    _watching: bool
    _hooks: list[Any]
    _stepped: list[Optimizer]
    _inside: dict[Optimizer, int]
    _with_state: list[Optimizer]
    _without: set[str]

    @abstractmethod
    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """The optimizer is about to step."""

    @abstractmethod
    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """It has stepped."""

    @abstractmethod
    def _forget_pending(self) -> None:
        """No update is made of the batches that are pending."""

    @abstractmethod
    def _whole_state(self) -> State:
        """A copy of the live state."""

    @abstractmethod
    def _aim(self) -> None:
        """The observer is another one."""

    def _stand_on(self, base: Base) -> None:
        """Begin after what earlier jobs recorded."""
        self._base, self._index, self._fresh = base, base.index, base.fresh
        self._names = {*base.names}
        if self._watching:
            self._let_join(self._observer)
            self._aim()

    def _begin_stage(self, name: str, *, explicit: bool) -> None:
        self._forget_pending()
        start = self._index
        if self._skipping and self._resumption is not None:
            start = resume.stage_of(self._resumption, name).start
        elif self._watching:
            last = self._last()
            buffers = (
                {} if self._discarded else last.buffers
            )  # a skipped update's forward moves them
            self._observer.require_unchanged(State(last.params, buffers), f"stage {name!r}")
        if self._watching:
            problem = self._problem.of(name)
            if not any(problem is known for known in self._losses):
                self._losses.append(problem)
            at = next(i for i, known in enumerate(self._losses) if known is problem)
            self._loss = self._base.losses + at
            self._observer.problem = problem
        self._stage = Stage(name, start, start)
        self._names.add(name)
        self._explicit, self._usual = explicit, 0
        self._after = None

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

    def _replace(self, optimizer: Stepper) -> None:
        """Another optimizer takes over, or the same with other groups.

        Hooks move; another one's state counts as fresh. Parameters that none held before join the
        state.
        """
        if not self._watching:
            return
        observer = self._observer.followed_by(optimizer)
        self._let_join(observer)
        for hook in self._hooks:
            hook.remove()
        self._fresh = self._fresh or optimizer is not self._observer.optimizer
        self._observer = observer
        self._hooks, self._versions = self._watch(), observer.versions()
        self._aim()

    def _let_join(self, observer: Observer) -> None:
        """Parameters that no optimizer held before are part of the state from here on."""
        joining = {n: p for n, p in observer.held.items() if n not in self._held}
        if joining and not self._skipping:
            frozen = tensors.load(memoryview((self._writer.folder / FROZEN_NAME).read_bytes()))
            if any(f"params/{name}" not in frozen for name in joining):
                raise RecordError(
                    f"{min(joining)} begins to train, and only its digest was recorded: with"
                    " frozen='reference' no parameter may join later. Record with"
                    " frozen='stored'."
                )
            observer.require_unchanged(
                State({name: frozen[f"params/{name}"] for name in joining}), "they begin to train"
            )
        self._joining = observer.state(joining, slots=False).params
        self._held = [*self._held, *joining]

    def _watch(self) -> list[Any]:
        if not self._watching:
            return []
        hooks: list[Any] = []
        for member in self._observer.members:
            hooks.append(member.register_step_pre_hook(self._begins_to_step))
            hooks.append(member.register_step_post_hook(self._has_stepped))
        return hooks

    # An update is one step of each optimizer; between the first and the last it is half made.

    def _begins_to_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        # A subclass that calls the step of its parent has the hooks called once more inside.
        self._inside[optimizer] = self._inside.get(optimizer, 0) + 1
        if self._inside[optimizer] > 1 or _overflowed(optimizer):
            return
        if optimizer in self._stepped:
            raise RecordError(self._half_made())
        if not self._stepped:
            self._without = set()
            members = self._observer.members
            cleared = [m for m in self._with_state if not m.state]
            if cleared and len(cleared) < len(self._with_state):
                raise RecordError(
                    f"the state of {type(cleared[0]).__name__} was cleared, and that of the other"
                    f" {len(members) - 1} optimizer(s) was not. Begin a stage with new optimizers:"
                    " recorder.stage(name, optimizer=[...])."
                )
            self._before_step(self._observer.optimizer, args, kwargs)

    def _has_stepped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._inside[optimizer] -= 1
        if self._inside[optimizer] > 0 or _overflowed(optimizer):
            return
        members = self._observer.members
        self._stepped.append(optimizer)
        # Now: a loop may clear one optimizer's gradients before the next one steps.
        self._without |= self._observer.without_gradient(optimizer)
        if len(self._stepped) == len(members):
            self._stepped = []
            self._after_step(self._observer.optimizer, args, kwargs)
            self._with_state = [m for m in members if m.state] if len(members) > 1 else []

    def _half_made(self) -> str:
        done = ", ".join(type(m).__name__ for m in self._stepped)
        left = [type(m).__name__ for m in self._observer.members if m not in self._stepped]
        return (
            f"update {self._index} is half made: {done} has stepped and {', '.join(left)} has not."
            " An update is one step of each optimizer that culpa.record was given. Loops that"
            " alternate between them (GANs) cannot be recorded; optimizers that step in stages of"
            " their own can: recorder.stage(name, optimizer=...)."
        )

    def _stop_watching(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._watching = [], False


def _overflowed(optimizer: Any) -> bool:
    """Whether a ``GradScaler`` told a fused optimizer to leave its parameters alone."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
