"""One pass over the stages: the run's path and those without a stage, segment by segment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor

from culpa import tree
from culpa.dynamics.krylov import Krylov, Updates, leap
from culpa.dynamics.local import LocalLoss
from culpa.errors import ProblemError
from culpa.estimators.embedding import StageTrust
from culpa.estimators.from_checkpoints.run import CheckpointRun
from culpa.estimators.from_checkpoints.segment import sampled_loss, split
from culpa.estimators.trust import DOUBTFUL, TRUSTED, grade_checkpoints
from culpa.problem import Problem
from culpa.progress import Progress
from culpa.trajectory.schema import Stage
from culpa.tree import Tree


@dataclass
class Carried:
    """The displacement of one stage on its way: parameters and momentum, minus those without it."""

    stage: Stage
    displacement: Tree = field(default_factory=dict[str, Tensor])
    velocity: Tree = field(default_factory=dict[str, Tensor])
    at_stage_end: float = 0.0
    errors: list[float] = field(default_factory=list[float])
    """One a stage passed: what its models leave out of D."""
    guessed: bool = False
    """Whether a momentum that no checkpoint holds had to be reconstructed on the way."""

    def trust(self, size: float) -> StageTrust:
        """See ``StageTrust`` and ``embed_checkpoints``; ``size`` is ||theta_K||."""
        now = tree.norm(self.displacement)
        growth = now / self.at_stage_end if self.at_stage_end > 0.0 else 1.0
        residual = float("nan")
        if self.errors:
            residual = sum(self.errors) / now if now > 0.0 else float("inf")
        relative = now / size if size > 0.0 else float("inf")
        grade = grade_checkpoints(growth, residual)
        if self.guessed and grade == TRUSTED:
            grade = DOUBTFUL
        return StageTrust(relative, growth, residual, grade)


@dataclass(frozen=True)
class Path:
    """A reconstructed way through one stage, and the remainder of the model of each segment."""

    params: Tree
    velocity: Tree
    remainders: list[Tree]


class Sweep:
    """Carries displacements through one stage after the other, two checkpoints in memory."""

    def __init__(
        self,
        run: CheckpointRun,
        problem: Problem,
        krylov: Krylov,
        counterfactual: str,
        names: Sequence[str],
    ) -> None:
        self.run, self.problem, self.krylov, self.names = run, problem, krylov, names
        self.counterfactual = counterfactual
        self.momentum: Tree = {}
        """The run's own momentum at the end of the stage before, reconstructed; empty: none."""

    def segments(self, carried: Sequence[Carried]) -> int:
        """How many segments all paths together have, the run's own included."""
        return sum(
            len(self._parts(at)) * (self._followed(at, carried) + len(self._passing(at, carried)))
            for at in range(len(self.run.stages))
        )

    def advance(self, at: int, carried: Sequence[Carried], watch: Progress) -> None:
        """Carry every displacement through stage ``at``."""
        run, begun = self.run, self.run.stages[at]
        momentum = {} if run.described[at].fresh_optimizer else self.momentum
        before = split(self.problem, run.checkpoint(at), at)
        start = {name: before.params[name] for name in self.names}
        losses: list[LocalLoss] = []
        observed = Path(start, {}, [])
        if self._followed(at, carried):
            losses = [
                sampled_loss(
                    self.problem,
                    self.names,
                    before,
                    run.batches(at),
                    self.krylov.examples,
                    self.krylov.seed * 1_000_003 + at * 1_009 + part,
                )
                for part in range(len(self._parts(at)))
            ]
            observed = self._follow(at, losses, start, momentum, watch)
        for one in carried:
            if one.stage == begun:
                end = split(self.problem, run.checkpoint(at + 1), at + 1).params
                one.displacement = {name: end[name] - start[name] for name in self.names}
                one.at_stage_end = tree.norm(one.displacement)
                # Without the stage the momentum is what it was before it, or none.
                kept = {} if self.counterfactual == "restart" else momentum
                one.velocity = tree.subtract(observed.velocity, kept)
        for one in self._passing(at, carried):
            velocity = {}
            if not run.described[at].fresh_optimizer:
                velocity = tree.subtract(momentum, one.velocity)
                one.guessed = one.guessed or run.described[at].momentum > 0.0
            without = tree.subtract(start, one.displacement)
            other = self._follow(at, losses, without, velocity, watch)
            one.displacement = tree.subtract(observed.params, other.params)
            one.velocity = tree.subtract(observed.velocity, other.velocity)
            one.errors.append(self._error(at, observed, other))
        self.momentum = observed.velocity

    def _follow(
        self, at: int, losses: Sequence[LocalLoss], params: Tree, velocity: Tree, watch: Progress
    ) -> Path:
        """Reconstruct a path through stage ``at``, each segment on rows of its own."""
        remainders: list[Tree] = []
        for loss, updates in zip(losses, self._parts(at), strict=True):
            local = loss.around(params)

            def product(vector: Tree, local: LocalLoss = local) -> Tree:
                return self.krylov.curvature.products(local, [vector])[0]

            decay = updates.weight_decay
            gradient = tree.add(local.gradient(params), tree.scale(decay, params))
            made = leap(product, gradient, velocity, updates, self.krylov.rank)
            params, velocity = tree.add(params, made.way), made.velocity
            met = tree.add(local.gradient(params), tree.scale(decay, params))
            remainders.append(tree.subtract(met, made.gradient))
            watch.advance()
        if not tree.is_finite(params):
            raise ProblemError(
                f"the path reconstructed through stage {self.run.stages[at].name!r} diverged: its"
                f" quadratic models do not hold for {max(map(len, self._parts(at)))} updates at a"
                f" time. Use more than segments={self.krylov.segments} in culpa.Krylov, or record"
                " the run."
            )
        return Path(params, velocity, remainders)

    def _error(self, at: int, observed: Path, other: Path) -> float:
        """What the models' remainders would have moved D by, by the trapezoidal rule.

        A remainder grows from 0 to its value at the segment's end, and acts for rate / (1 - mu) an
        update.
        """
        total: Tree = {}
        for updates, ours, theirs in zip(
            self._parts(at), observed.remainders, other.remainders, strict=True
        ):
            time = 0.5 * sum(updates.rates) / (1.0 - updates.momentum)
            total = tree.add(total, tree.scale(time, tree.subtract(ours, theirs)))
        return tree.norm(total)

    def _parts(self, at: int) -> list[Updates]:
        """The updates of stage ``at``, cut into segments of equal length up to one update."""
        updates = self.run.described[at].updates
        count = min(self.krylov.segments, len(updates))
        bounds = [round(len(updates) * part / count) for part in range(count + 1)]
        return [updates.part(a, b) for a, b in pairwise(bounds)]

    def _passing(self, at: int, carried: Sequence[Carried]) -> list[Carried]:
        """Those whose stage is over when stage ``at`` begins."""
        return [one for one in carried if one.stage.stop <= self.run.stages[at].start]

    def _followed(self, at: int, carried: Sequence[Carried]) -> bool:
        """Whether the run's own path through stage ``at`` is needed.

        For a difference, or for the momentum with which the first stage embedded begins or that it
        leaves behind.
        """
        if self._passing(at, carried):
            return True
        first = min(self.run.stages.index(one.stage) for one in carried)
        if first == len(self.run.stages) - 1:  # the last stage's embedding is exact without
            return False
        until = first + 1 if at == first else first
        return not any(self.run.described[k].fresh_optimizer for k in range(at + 1, until + 1))
