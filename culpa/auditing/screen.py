"""Screening: what first-order sweeps say of every update and every stage, as plain results."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import msgspec

from culpa.auditing.drill import Examples, most_helpful_and_harmful
from culpa.auditing.intervals import Estimate
from culpa.auditing.tasks import Bench
from culpa.dynamics.propagator import Exact, Propagator
from culpa.errors import UnsupportedError
from culpa.estimators.adjoint import attribute
from culpa.estimators.embed import embed
from culpa.estimators.trust import DOUBTFUL, NOT_IDENTIFIED, TRUSTED
from culpa.trajectory.schema import Stage

GRADES = (TRUSTED, DOUBTFUL, NOT_IDENTIFIED)


class Screened(msgspec.Struct, frozen=True, kw_only=True):
    """The scores of all updates (``culpa.attribute``), one list entry an update.

    ``refused`` says why there are none; then every list is empty.
    """

    steps: list[list[float | None]]
    growth: list[float | None]
    displacement: list[float | None]
    grades: list[str]
    examples: list[Examples]
    propagator: str
    citation: str
    fallback: int | None
    claim: str
    updates: int
    seconds: float
    refused: str = ""


class Embedded(msgspec.Struct, frozen=True, kw_only=True):
    """What the embeddings say (``culpa.embed``), one list entry a stage, in each one a behaviour.

    ``refused`` says why there are none; then every list is empty.
    """

    effects: list[list[float | None]]
    scores: list[list[float | None]]
    displacement: list[float | None]
    growth: list[float | None]
    residual: list[float | None]
    grades: list[str]
    propagator: str
    claim: str
    updates: int
    seconds: float
    refused: str = ""


def screen(bench: Bench, propagator: Propagator | None) -> Screened:
    """Score every update and, where the problem has example losses, every training example."""
    began, run = time.monotonic(), bench.run
    try:
        scores = attribute(
            run,
            bench.problem,
            bench.behaviours,
            propagator=propagator,
            counterfactual=bench.counterfactual,
            examples=bench.problem.example_losses is not None,
            allow_drift=bench.allow_drift,
            progress=bench.progress,
        )
    except UnsupportedError as error:
        return Screened(
            steps=[],
            growth=[],
            displacement=[],
            grades=[],
            examples=[],
            propagator="none",
            citation="",
            fallback=None,
            claim="bitwise",
            updates=0,
            seconds=0.0,
            refused=str(error),
        )
    return Screened(
        steps=scores.steps.tolist(),
        growth=[t.growth for t in scores.trust],
        displacement=[t.displacement for t in scores.trust],
        grades=[t.grade for t in scores.trust],
        examples=[] if scores.examples is None else most_helpful_and_harmful(run, scores.examples),
        propagator=repr(scores.propagator),
        citation=scores.propagator.citation,
        fallback=scores.fallback,
        claim=scores.claim,
        updates=run.num_steps,
        seconds=time.monotonic() - began,
    )


def embed_stages(bench: Bench, propagator: Propagator | None) -> Embedded:
    """Embed every stage of the bench's run."""
    began, behaviours = time.monotonic(), bench.behaviours
    try:
        found = embed(
            bench.run,
            bench.problem,
            # Named, since embed would replay two stages, and the budget is the audit's to spend.
            propagator=propagator or Exact(at="gauss"),
            counterfactual=bench.counterfactual,
            allow_drift=bench.allow_drift,
            progress=bench.progress,
        )
    except UnsupportedError as error:
        return Embedded(
            effects=[],
            scores=[],
            displacement=[],
            growth=[],
            residual=[],
            grades=[],
            propagator="none",
            claim="bitwise",
            updates=0,
            seconds=0.0,
            refused=str(error),
        )
    effects = [found.effect(b).mean(1).tolist() for b in behaviours]
    scores = [found.score(b).mean(1).tolist() for b in behaviours]
    trust = [found.trust[stage.name] for stage in bench.run.stages]
    return Embedded(
        effects=[list(row) for row in zip(*effects, strict=True)],
        scores=[list(row) for row in zip(*scores, strict=True)],
        displacement=[t.displacement for t in trust],
        growth=[t.growth for t in trust],
        residual=[t.residual for t in trust],
        grades=[t.grade for t in trust],
        propagator=str(found.facts["propagator"]),
        claim=found.facts["claim"],
        updates=bench.run.num_steps,
        seconds=time.monotonic() - began,
    )


def sums(screened: Screened, stages: Sequence[Stage], width: int) -> dict[str, Estimate]:
    """The estimates that the screening alone gives: sums of update scores (Estimator 4.3).

    Graded as the worst update that makes up a tenth of the stage or more, never above doubtful:
    that the updates' effects add up is assumed.
    """
    found: dict[str, Estimate] = {}
    for stage in stages:
        rows = screened.steps[stage.start : stage.stop]
        effects = [
            math.fsum(number(row[q]) for row in rows) if rows else math.nan for q in range(width)
        ]
        grade = _common_grade(screened.grades[stage.start : stage.stop])
        found[stage.name] = Estimate(effects, effects, None, grade)
    return found


def estimates(embedded: Embedded, stages: Sequence[Stage]) -> dict[str, Estimate]:
    """The estimates of the embeddings."""
    return {
        stage.name: Estimate(
            [number(v) for v in embedded.effects[i]],
            [number(v) for v in embedded.scores[i]],
            number(embedded.residual[i]),
            embedded.grades[i],
        )
        for i, stage in enumerate(stages)
    }


def number(value: float | None) -> float:
    """JSON has ``null`` where a number was not finite."""
    return math.nan if value is None else value


def _common_grade(grades: Sequence[str]) -> str:
    for grade in (NOT_IDENTIFIED, DOUBTFUL):
        if not grades or grades.count(grade) >= 0.1 * len(grades):
            return grade
    return DOUBTFUL
