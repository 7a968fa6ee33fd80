"""How far a number can be trusted: the measurable ingredients of Theorem 4.1, and a grade."""

from __future__ import annotations

import math
from dataclasses import dataclass

TRUSTED, DOUBTFUL, NOT_IDENTIFIED = "trusted", "doubtful", "not identified"

GROWTH_TRUSTED, GROWTH_DOUBTFUL = 3.0, 15.0
"""Bounds on the growth of the adjoint."""
RESIDUAL_TRUSTED, RESIDUAL_DOUBTFUL = 0.2, 0.6
"""Bounds on the relative error of the linearised gradient difference."""
MISMATCH_ALLOWED = 1e-2
"""Above it the differentiable step is not the recorded one, and nothing is trusted."""


@dataclass(frozen=True)
class Trust:
    """The trust in the scores of one update.

    Attributes:
        growth: ||p_{t+1}|| / ||grad gamma||, the largest over behaviours: by how much the training
            after the update amplifies a perturbation of the parameters (e^{eta Lambda (K - t)}).
        displacement: ||Delta_t|| / ||theta_t||, the size of what is propagated (D_S).
        mismatch: the relative distance of the differentiable step from the recorded one.
        grade: ``"trusted"``, ``"doubtful"`` or ``"not identified"``.
    """

    growth: float
    displacement: float
    mismatch: float
    grade: str


def grade_update(growth: float, mismatch: float) -> str:
    """The grade of an update's scores."""
    if not (math.isfinite(growth) and mismatch <= MISMATCH_ALLOWED):
        return NOT_IDENTIFIED
    if growth <= GROWTH_TRUSTED:
        return TRUSTED
    return DOUBTFUL if growth <= GROWTH_DOUBTFUL else NOT_IDENTIFIED


def grade_stage(growth: float, residual: float) -> str:
    """The grade of a stage's embedding. ``residual`` is nan where nothing was linearised."""
    if math.isnan(residual):
        return TRUSTED
    if not (math.isfinite(growth) and math.isfinite(residual)):
        return NOT_IDENTIFIED
    if growth <= GROWTH_TRUSTED and residual <= RESIDUAL_TRUSTED:
        return TRUSTED
    return (
        DOUBTFUL if growth <= GROWTH_DOUBTFUL and residual <= RESIDUAL_DOUBTFUL else NOT_IDENTIFIED
    )
