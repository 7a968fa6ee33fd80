"""A training that has not happened, and a short rehearsal of it, after which nothing is changed."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from culpa.auditing.forecasting.stopwatch import Clock, typical
from culpa.errors import OptionError
from culpa.problem import Loss, Problem, StagedProblem
from culpa.trajectory.borrowing import borrowed
from culpa.trajectory.checkpoints import AtStages, CheckpointPolicy, Thinned
from culpa.trajectory.record import record

LEAST, FEW, ENOUGH = 2, 16, 33
"""Updates of the rehearsals. A sweep over fewer than 32 measures its trust at every one."""
PARTS = 3
"""The rehearsal has at most so many stages, unless each has a loss of its own."""


@dataclass(frozen=True)
class Plan:
    """A training to be recorded: what ``culpa.forecast`` needs to know of it.

    Args:
        problem: the model and the loss, as for ``culpa.record``.
        optimizer: the one that will train. It and the model are left as they are, bit for bit.
        batches: a few typical batches, as the loader yields them: a list, such as
            ``list(itertools.islice(loader, 8))``. More varied ones make a better forecast.
        stages: how many updates each stage will have, by name; or how many there will be in all.
        examples: how many distinct training examples there are, which are stored once each. Not
            given: as if every update saw new ones.
        accumulate: batches that make one update.
        clip_grad_norm, checkpoints, frozen: as for ``culpa.record``.
    """

    problem: Problem
    optimizer: Optimizer
    batches: Sequence[Any]
    stages: Mapping[str, int] | int
    examples: int | None = None
    accumulate: int = 1
    clip_grad_norm: float | None = None
    checkpoints: CheckpointPolicy | None = None
    frozen: str = "stored"

    def __post_init__(self) -> None:
        """Refuse a plan of nothing."""
        if not hasattr(self.batches, "__getitem__") or not len(self.batches):
            raise OptionError(
                "Plan(batches=...) is a list of at least one batch, such as"
                " list(itertools.islice(loader, 8)); got"
                f" {type(self.batches).__name__ if len_of(self.batches) else 'an empty one'}."
            )
        lengths = self.lengths
        if not lengths or min(lengths.values()) < 1 or self.accumulate < 1:
            raise OptionError(
                "Plan(stages=..., accumulate=...) takes whole numbers of updates and batches, each"
                f" at least 1; got {self.stages!r} and {self.accumulate!r}."
            )

    @property
    def lengths(self) -> dict[str, int]:
        """Updates by stage."""
        return {"stage 0": self.stages} if isinstance(self.stages, int) else dict(self.stages)

    @property
    def updates(self) -> int:
        """In all."""
        return sum(self.lengths.values())


def len_of(batches: Any) -> int:
    """Its length; 1 for what has none."""
    return len(batches) if hasattr(batches, "__len__") else 1


@dataclass(frozen=True)
class Planned:
    """The history that a plan will leave (a ``prices.History``)."""

    num_steps: int
    kept_states: tuple[int, ...]

    def kept_before(self, k: int) -> int:
        """The largest kept index <= k."""
        return max(i for i in self.kept_states if i <= k)


def history(plan: Plan, state_bytes: int) -> tuple[Planned, int]:
    """The history, and how many states recording it writes, those that it drops again included."""
    policy: Any = plan.checkpoints or Thinned()
    if hasattr(policy, "sized"):
        policy = policy.sized(state_bytes)
    ends, total = set[int](), 0
    for length in plan.lengths.values():
        total += length
        ends.add(total)
    at_ends = hasattr(policy, "at_boundary") and policy.at_boundary()
    kept, written = {0}, 1
    for k in range(1, total + 1):
        wanted = policy.keep(k)
        if wanted or k == total or (at_ends and k in ends):
            written += 1
            kept.add(k)
        if wanted and k < total:  # only then others are looked at
            kept -= {i for i in kept if 0 < i < k and policy.obsolete(i, k)}
    return Planned(total, tuple(sorted(kept))), written


@dataclass(frozen=True)
class Rehearsal:
    """Seconds of a short recording: before the first update, of each update by stage, to close."""

    opening: float
    updates: list[list[float]]
    closing: float

    @property
    def each(self) -> float:
        """Of one update, the first of each stage left out: it is executed twice."""
        return typical([s for stage in self.updates for s in stage[1:]])


def rehearse(plan: Plan, folder: Path, length: int, clock: Clock) -> Rehearsal:
    """Record so many updates of the plan in ``folder``; ``ENOUGH`` in its stages, fewer in one.

    Fewer keep no state in between, so that the difference shows what keeping costs.
    """
    many = length >= ENOUGH
    names = list(plan.lengths)
    if not isinstance(plan.problem, StagedProblem):
        names = names[:PARTS] if many else names[:1]
    lengths = [max(2, length // len(names)) for _ in names]
    lengths[-1] += max(0, length - sum(lengths))
    policy = (plan.checkpoints or Thinned()) if many else AtStages()
    took, n = list[list[float]](), plan.accumulate
    with borrowed(plan.problem.model), lent(plan.optimizer):
        last = began = clock()
        with record(
            folder,
            plan.problem,
            plan.optimizer,
            clip_grad_norm=plan.clip_grad_norm,
            checkpoints=policy,
            frozen=plan.frozen,
        ) as recorder:
            opening, last, seen = clock() - began, clock(), 0
            for name, count in zip(names, lengths, strict=True):
                took.append([])
                loss = plan.problem.of(name).loss
                batches = [plan.batches[(seen + i) % len(plan.batches)] for i in range(count * n)]
                seen += len(batches)
                with recorder.stage(name):
                    for at, batch in enumerate(recorder.batches(batches)):
                        _micro_step(plan, loss, batch, at % n)
                        if at % n == n - 1:
                            now = clock()
                            took[-1].append(now - last)
                            last = now
        closing = clock() - last
    return Rehearsal(opening, took, closing)


def _micro_step(plan: Plan, loss: Loss, batch: Any, at: int) -> None:
    """One batch of those that make an update, as loops go through them."""
    if at == 0:
        plan.optimizer.zero_grad()
    (loss(plan.problem.model, batch) / plan.accumulate).backward()
    if at < plan.accumulate - 1:
        return
    if plan.clip_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(plan.problem.model.parameters(), plan.clip_grad_norm)
    plan.optimizer.step()


@contextmanager
def lent(optimizer: Optimizer) -> Generator[None]:
    """Lend the optimizer; afterwards its state and groups are as they were, bit for bit."""
    live: Any = optimizer
    groups = [dict(group) for group in live.param_groups]
    state = {p: dict(slots) for p, slots in live.state.items()}
    values = {
        p: {name: v.detach().clone() for name, v in slots.items() if isinstance(v, Tensor)}
        for p, slots in state.items()
    }
    called = vars(live).get("_opt_called")
    try:
        yield
    finally:
        live.state.clear()
        for p, slots in state.items():
            with torch.no_grad():
                for name, value in values[p].items():
                    slots[name].copy_(value)
            live.state[p] = slots
        for group, before in zip(live.param_groups, groups, strict=True):
            group.clear()
            group.update(before)
        if called is not None:
            live._opt_called = called
