"""The experiments of an audit as independent tasks: plain descriptions in, plain results out.

Any executor may run them, in any order and any process, for a task holds all that distinguishes it
from the others, and a result holds no tensor. What is common to all (the run, the problem, the
behaviours) is a ``Bench``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import msgspec

from culpa import tree
from culpa._version import __version__
from culpa.auditing.placebo import noise_floor
from culpa.auditing.record import BehaviourFacts
from culpa.behaviour import Behaviour
from culpa.estimators.adjoint import gradient_of
from culpa.estimators.embedding import StageEmbeddings
from culpa.estimators.layers import effect_by_layer
from culpa.problem import Problem
from culpa.progress import Progress
from culpa.trajectory.replay import model_state, replay, values_at
from culpa.trajectory.run import Run
from culpa.trajectory.schema import Stage
from culpa.trajectory.state import on_cpu
from culpa.trajectory.walk import session
from culpa.tree import Tree

LAYER_POINTS = 8
"""Gauss-Legendre points at which a stage's effect is split by layer."""


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """One replay: without the updates ``[start, stop)`` or, where there are none, a placebo.

    A placebo is the history disturbed by rounding-sized noise before update ``start``; ``seed``
    draws the noise.
    """

    start: int
    stop: int
    seed: int = 0
    drill: bool = False
    """Also find the AA-Scores, for which the behaviours must be differentiable, and the layers."""

    @property
    def is_placebo(self) -> bool:
        """Whether nothing is removed."""
        return self.start == self.stop

    @property
    def name(self) -> str:
        """By which its result is kept."""
        if self.is_placebo:
            return f"placebo before {self.start}, seed {self.seed}"
        return f"without {self.start} to {self.stop}"


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a task found: per behaviour the true ``effects`` and, for removals, the AA-Scores.

    ``scores`` are gradient of the behaviour . D with the exact D; ``displacement`` is ||D|| over
    the norm of the final parameters. ``updates`` were executed, in ``seconds``. ``layers``: per
    behaviour the effect by layer (``culpa.effect_by_layer``, again with the exact D).
    """

    effects: list[float]
    scores: list[float]
    displacement: float
    updates: int
    seconds: float
    claim: str
    layers: list[dict[str, float]] = []


@runtime_checkable
class Executor(Protocol):
    """Runs tasks; the results in their order."""

    def map(self, work: Callable[[Task], Outcome], tasks: Sequence[Task]) -> Iterable[Outcome]:
        """``work(task)`` for every task."""
        ...


class Serial:
    """One after the other, here: the default."""

    def map(self, work: Callable[[Task], Outcome], tasks: Sequence[Task]) -> Iterator[Outcome]:
        """``work(task)`` for every task, each when it is asked for."""
        return map(work, tasks)


class Bench:
    """Everything that the tasks of one audit have in common; call it with a task."""

    def __init__(
        self,
        run: Run,
        problem: Problem,
        behaviours: Sequence[Behaviour],
        *,
        counterfactual: str,
        allow_drift: bool,
        progress: Progress | None,
    ) -> None:
        self.run = run
        self.problem = problem
        self.behaviours = behaviours
        self.counterfactual = counterfactual
        self.allow_drift = allow_drift
        self.progress = progress
        self._gradients: list[Tree] | None = None
        self._observed: list[BehaviourFacts] = []

    def __call__(self, task: Task) -> Outcome:
        """Execute it."""
        began = time.monotonic()
        if task.is_placebo:
            return self._placebo(task, began)
        found = replay(
            self.run,
            self.problem,
            without=range(task.start, task.stop),
            counterfactual=self.counterfactual,
            allow_drift=self.allow_drift,
            progress=self.progress,
        )
        final = self.run.final_state()
        moved = {n: final[n] - found.state[n] for n in self.run.state(self.run.num_steps).params}
        size = tree.norm(final)
        gradients = self.gradients if task.drill else []
        return Outcome(
            effects=[float(found.effect(b).mean()) for b in self.behaviours],
            scores=[tree.dot(gradient, moved) for gradient in gradients],
            displacement=tree.norm(moved) / size if size > 0.0 else float("inf"),
            updates=found.updates_executed,
            seconds=time.monotonic() - began,
            claim=found.claim,
            layers=self._by_layer(moved) if task.drill else [],
        )

    @property
    def observed(self) -> list[BehaviourFacts]:
        """Every behaviour's value at the end of training."""
        if not self._observed:
            with session(self.run, self.problem, self.allow_drift):
                ended = model_state(self.run)
                values = [values_at(ended, b, self.problem) for b in self.behaviours]
            self._observed = [
                BehaviourFacts(name=b.name, unit=b.unit, value=float(v.mean()), count=len(v))
                for b, v in zip(self.behaviours, values, strict=True)
            ]
        return self._observed

    def identity(self) -> dict[str, Any]:
        """What the results of its tasks depend on, for the ledger.

        A behaviour is known by its name and by its value at the end of training, to the last bit.
        """
        return {
            "culpa": __version__,
            "root digest": self.run.root_digest or self.run.manifest.created,
            "behaviours": [(f.name, f.unit, f.value.hex(), f.count) for f in self.observed],
            "counterfactual": self.counterfactual,
            "allow_drift": self.allow_drift,
        }

    @property
    def gradients(self) -> list[Tree]:
        """The gradient of every behaviour at the final parameters that trained."""
        if self._gradients is None:
            names = self.run.state(self.run.num_steps).params.keys()
            with session(self.run, self.problem, self.allow_drift):
                final, buffers = model_state(self.run)
                self._gradients = [
                    on_cpu(gradient_of(self.problem, b, final, buffers, names))
                    for b in self.behaviours
                ]
        return self._gradients

    def _by_layer(self, moved: Tree) -> list[dict[str, float]]:
        run, stage = self.run, Stage("removed", 0, self.run.num_steps)
        state = (run.final_state(), run.final_buffers())
        exact = StageEmbeddings((stage,), {stage.name: moved}, {}, *state, {}, self.problem)
        splits = (effect_by_layer(exact, b, LAYER_POINTS).layers for b in self.behaviours)
        return [{layer: float(v[0]) for layer, v in split.items()} for split in splits]

    def _placebo(self, task: Task, began: float) -> Outcome:
        found = noise_floor(
            self.run,
            self.problem,
            self.behaviours,
            at=task.start,
            repeats=1,
            seed=task.seed,
            allow_drift=self.allow_drift,
            progress=self.progress,
        )
        return Outcome(
            effects=found.effects[0].tolist(),
            scores=[],
            displacement=0.0,
            updates=self.run.num_steps - self.run.kept_before(task.start),
            seconds=time.monotonic() - began,
            claim=found.claim,
        )
