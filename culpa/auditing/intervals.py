"""Intervals of stage effects: the estimates' errors, calibrated on the stages that were replayed.

The error of an estimate is modelled as its unit times a Student t variable of n0 + n degrees:

    unit of stage i       u_i = (r_i + R0) max(|estimate_i|, |AA-Score_i|, F max_j |estimate_j|)
    scale from n replays  c^2 = (n0 C0^2 + sum over replayed j of ((truth_j - estimate_j) / u_j)^2)
                                / (n0 + n)
    half-width at 95 %    t(0.975, n0 + n) c u_i + noise floor

with r_i the residual of Theorem 4.1's proof (``StageTrust.residual``), for each behaviour of its
own. The prior scale C0 and its weight n0 in replays stand for the runs the model was calibrated on:
8 stages of digits in 16 runs, SGD and AdamW at four learning rates each. There, without any replay,
the half-widths covered 100 % of trusted estimates (n = 285) and of doubtful ones (21), and with
four random stages replayed 99.8 % and 93 to 97 %. For sums of update scores r_i + R0 is 1 and F a
quarter: 98.6 and 96 %. Of estimates that are not identified nothing is claimed.

A replayed effect is exact; its half-width is the noise floor alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from culpa.auditing.floor import student
from culpa.estimators.trust import NOT_IDENTIFIED

PRIOR_SCALE, PRIOR_WEIGHT = 1.0, 4
ROUGHNESS = 0.01
"""R0: the relative error of an estimate whose residual is nothing."""
OTHERS = 0.1
"""F: the part of the largest estimate that counts as the size of every estimate."""
OTHERS_OF_SUMS = 0.25


@dataclass(frozen=True)
class Estimate:
    """What is estimated of one stage: per behaviour the effect and the AA-Score, and its trust.

    ``residual`` is ``None`` for a sum of update scores, of which no error was measured, and nan
    for the last stage, whose estimate is exact.
    """

    effects: Sequence[float]
    scores: Sequence[float]
    residual: float | None
    grade: str


def half_widths(
    estimates: Mapping[str, Estimate], truths: Mapping[str, Sequence[float]], behaviour: int
) -> dict[str, float]:
    """By stage the half-width of its estimate at 95 %, without the noise floor; inf: unknown.

    Args:
        estimates: of every stage.
        truths: the replayed effects, of some.
        behaviour: the number of the behaviour.
    """
    units = _units(estimates, behaviour)
    squares = [
        ((truths[name][behaviour] - estimates[name].effects[behaviour]) / units[name]) ** 2
        for name in truths
        if 0.0 < units[name] < math.inf
    ]
    degrees = PRIOR_WEIGHT + len(squares)
    scale = math.sqrt((PRIOR_WEIGHT * PRIOR_SCALE**2 + sum(squares)) / degrees)
    return {name: student(degrees) * scale * unit for name, unit in units.items()}


def _units(estimates: Mapping[str, Estimate], q: int) -> dict[str, float]:
    sizes = [abs(e.effects[q]) for e in estimates.values() if math.isfinite(e.effects[q])]
    largest = max(sizes, default=0.0)
    units: dict[str, float] = {}
    for name, estimate in estimates.items():
        size = max(abs(estimate.effects[q]), abs(estimate.scores[q]))
        if estimate.residual is None:
            unit = max(size, OTHERS_OF_SUMS * largest)
        else:
            unit = (estimate.residual + ROUGHNESS) * max(size, OTHERS * largest)
        if estimate.residual is not None and math.isnan(estimate.residual):
            unit = 0.0
        if estimate.grade == NOT_IDENTIFIED or not math.isfinite(unit):
            unit = math.inf
        units[name] = unit
    return units
