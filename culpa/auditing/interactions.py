"""Stage interactions: what every subset of the stages does together, exactly, by replay.

v(T) is the behaviour's mean at the end of the history in which, of the stages asked about, those in
T are executed and the others are removed. All 2^N histories are leaves of a binary tree over time:
the state at the start of a stage is computed once, and both histories, with and without that stage,
go on from it. Updates that belong to no such stage are executed in every history.

Shapley values and interaction terms of that game: ``game.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from culpa.auditing.game import interaction_indices, last_differences, shapley_values
from culpa.behaviour import Behaviour
from culpa.errors import OptionError, StageError
from culpa.problem import Problem
from culpa.progress import Progress, Silent
from culpa.trajectory.compared import Randomness
from culpa.trajectory.engine import Engine
from culpa.trajectory.fidelity import BITWISE
from culpa.trajectory.replay import check_counterfactual, execute
from culpa.trajectory.run import Run
from culpa.trajectory.schema import Stage
from culpa.trajectory.state import State
from culpa.trajectory.walk import session


@dataclass(frozen=True)
class Interactions:
    """What the stages do alone and together, exact. Positive: it raised the behaviour.

    All in each behaviour's unit, means over its test points, float64. A subset of the stages is a
    number whose bit i is set where stage i was executed: 0 is none, 2^N - 1 the observed run.

    Attributes:
        stages: names in order of time.
        behaviours, units: of the columns.
        values: ``[2^N, Q]``, v of every subset.
        single: ``[N, Q]``, tau_i: v(all) - v(all but i), what ``culpa.replay`` without i gives.
        shapley: ``[N, Q]``, phi_i; sums to ``total``.
        total: ``[Q]``, v(all) - v(none).
        residual: ``[Q]``, the sum of ``single`` minus ``total``: 0 where effects simply add up.
        pairs: ``[N, N, Q]``, the Shapley interaction index; symmetric, zero diagonal. Positive:
            the two do more together than apart, on average over what else is removed.
        observed_pairs: ``[N, N, Q]``, tau_i + tau_j - tau_ij, the same at the observed run.
        counterfactual: what "removed" means.
        updates_executed: the cost; ``separate_updates`` what 2^N separate replays would have cost.
        claim: ``"bitwise"``, or the drift of the observed history here from the record; see
            ``culpa.replay(allow_drift=True)``.
    """

    stages: tuple[str, ...]
    behaviours: tuple[str, ...]
    units: tuple[str, ...]
    values: Float64[Tensor, "subsets behaviours"]
    single: Float64[Tensor, "stages behaviours"]
    shapley: Float64[Tensor, "stages behaviours"]
    total: Float64[Tensor, " behaviours"]
    residual: Float64[Tensor, " behaviours"]
    pairs: Float64[Tensor, "stages stages behaviours"]
    observed_pairs: Float64[Tensor, "stages stages behaviours"]
    counterfactual: str
    updates_executed: int
    separate_updates: int
    claim: str = BITWISE

    def value(self, without: str | Iterable[str] = ()) -> Float64[Tensor, " behaviours"]:
        """v of the history without these stages, ``[Q]``.

        Raises:
            StageError: for a stage that is not among ``stages``.
        """
        subset = len(self.values) - 1
        for name in [without] if isinstance(without, str) else without:
            if name not in self.stages:
                known = ", ".join(map(repr, self.stages))
                raise StageError(f"no stage {name!r} among those interacting: {known}.")
            subset &= ~(1 << self.stages.index(name))
        return self.values[subset]

    def __str__(self) -> str:
        """Per behaviour: single effects and Shapley values, and what does not add up."""
        width = max(map(len, (*self.stages, "not additive")))
        lines: list[str] = []
        for q, (behaviour, unit) in enumerate(zip(self.behaviours, self.units, strict=True)):
            lines.append(f"{behaviour} [{unit}]: removed alone, Shapley value")
            lines += [
                f"  {name:<{width}}  {float(self.single[i, q]):+.4g}  "
                f"{float(self.shapley[i, q]):+.4g}"
                for i, name in enumerate(self.stages)
            ]
            sums = float(self.single[:, q].sum()), float(self.total[q])
            lines.append(f"  {'sum':<{width}}  {sums[0]:+.4g}  {sums[1]:+.4g}")
            lines.append(f"  {'not additive':<{width}}  {float(self.residual[q]):+.4g}")
        return "\n".join(lines)


def updates_to_execute(
    run: Run, stages: Sequence[str] | None = None, counterfactual: str = "skip"
) -> int:
    """The number of updates that ``interactions`` of these stages (default all) executes.

    Boundary i is passed by 2^i histories; each of them executes the stage once, for both branches.
    Under ``"zero-gradient"`` removed updates only tick the optimizer, and are not counted.
    """
    check_counterfactual(counterfactual)
    chosen = _chosen(run, stages)
    count = chosen[0].start - run.kept_before(chosen[0].start)
    for i, (stage, stop) in enumerate(_segments(run, chosen)):
        count += 2**i * len(stage) + 2 ** (i + 1) * (stop - stage.stop)
    return count


def interactions(
    run: Run,
    problem: Problem,
    behaviours: Sequence[Behaviour],
    *,
    stages: Sequence[str] | None = None,
    counterfactual: str = "skip",
    max_stages: int = 6,
    allow_drift: bool = False,
    progress: Progress | None = None,
) -> Interactions:
    """Remove every subset of the stages, exactly, and say what they do alone and together.

    Args:
        run: the recorded run.
        problem: the problem it was recorded with; its model is borrowed and left as it was.
        behaviours: evaluated only; they need not be differentiable.
        stages: names; default all.
        counterfactual: what "removed" means; see ``culpa.replay``.
        max_stages: refuse more stages than this: the cost doubles with each.
        allow_drift: measure what does not reproduce instead of refusing it; see ``culpa.replay``.
        progress: see ``culpa.progress``.

    Returns:
        Interactions. Cost: ``updates_to_execute(run, stages)`` updates, and every behaviour once
        for each subset. Memory: one state a stage.

    Raises:
        OptionError: no behaviour, or more than ``max_stages`` stages: says what they would cost.
        StageError: an unknown stage, or none.
        EnvironmentDifference: if a replay here need not be bitwise.
        IntegrityError: if the observed history does not reproduce.
    """
    check_counterfactual(counterfactual)
    if isinstance(behaviours, Behaviour) or not behaviours:
        raise OptionError(f"interactions needs a list of behaviours, got {behaviours!r}.")
    chosen = _chosen(run, stages)
    cost, size = updates_to_execute(run, stages, counterfactual), len(chosen)
    if size > max_stages:
        raise OptionError(
            f"the subsets of {size} stages would take {cost} updates,"
            f" {cost / run.num_steps:.1f} times the run's own {run.num_steps}, and {2**size}"
            f" evaluations of each behaviour. Name fewer in stages=, or pass max_stages={size}."
        )
    values = torch.empty(2**size, len(behaviours), dtype=torch.float64)
    watch = progress or Silent()
    watch.start("interactions", _visited(run, chosen))
    try:
        with session(run, problem, allow_drift) as engine:
            for subset, _ in histories(run, engine, chosen, counterfactual, watch):
                means = [float(b.values(problem.model).mean()) for b in behaviours]
                values[subset] = torch.tensor(means, dtype=torch.float64)
    finally:
        watch.finish()
    single = torch.stack([values[-1] - values[-1 - (1 << i)] for i in range(size)])
    total = values[-1] - values[0]
    return Interactions(
        tuple(s.name for s in chosen),
        tuple(b.name for b in behaviours),
        tuple(b.unit for b in behaviours),
        values,
        single,
        shapley_values(values),
        total,
        single.sum(0) - total,
        interaction_indices(values),
        last_differences(values),
        counterfactual,
        cost,
        _separate(run, chosen),
        engine.fidelity.claim,
    )


def histories(
    run: Run, engine: Engine, stages: Sequence[Stage], counterfactual: str, progress: Progress
) -> Generator[tuple[int, State]]:
    """Every subset of executed stages with the final state of its history, the observed one first.

    At each the engine is in that state; a consumer may evaluate the module but must leave its
    tensors as they are. ``stages`` are in order of time.
    """
    segments = _segments(run, stages)
    start = stages[0].start
    at = run.kept_before(start)
    engine.load(run.state(at))
    randomness = Randomness()
    execute(run, engine, range(at, start), frozenset(), counterfactual, randomness, progress)

    def branch(
        depth: int, subset: int, removed: frozenset[int], randomness: Randomness
    ) -> Generator[tuple[int, State]]:
        here = engine.state()
        if depth == len(segments):
            yield subset, here
            return
        stage, stop = segments[depth]
        both = ((1 << depth, removed), (0, removed | frozenset(stage.updates)))
        for at, (bit, gone) in enumerate(both):
            if at:
                engine.load(here)
            # Each branch goes on from where the generators stood, not from where its twin left off.
            own, updates = copy.copy(randomness), range(stage.start, stop)
            execute(run, engine, updates, gone, counterfactual, own, progress)
            yield from branch(depth + 1, subset | bit, gone, own)

    yield from branch(0, 0, frozenset(), randomness)


def _chosen(run: Run, stages: Sequence[str] | None) -> list[Stage]:
    """The stages asked about, in order of time."""
    if isinstance(stages, str):
        raise StageError(f"stages= takes a list of names; write stages=[{stages!r}].")
    found = run.stages if stages is None else [run.stage(n) for n in dict.fromkeys(stages)]
    if not found:
        raise StageError(f"no stage to remove: {run.path} has {len(run.stages)}, {stages=}.")
    return sorted(found, key=lambda s: s.start)


def _segments(run: Run, stages: Sequence[Stage]) -> list[tuple[Stage, int]]:
    """Each stage with the update at which the next one, or nothing, begins."""
    return list(zip(stages, [*(s.start for s in stages[1:]), run.num_steps], strict=True))


def _visited(run: Run, stages: Sequence[Stage]) -> int:
    """Updates passed in all histories, executed or removed: the units of progress."""
    shared = stages[0].start - run.kept_before(stages[0].start)
    ways = (2 ** (i + 1) * (stop - s.start) for i, (s, stop) in enumerate(_segments(run, stages)))
    return shared + sum(ways)


def _separate(run: Run, stages: Sequence[Stage]) -> int:
    """Updates that 2^N calls of ``culpa.replay`` would execute."""
    count = 0
    for subset in range(2 ** len(stages)):
        gone = [s for i, s in enumerate(stages) if subset >> i & 1]
        first = min((s.start for s in gone), default=0)
        count += run.num_steps - run.kept_before(first) - sum(map(len, gone))
    return count
