"""How far a number can be trusted: the measurable ingredients of Theorem 4.1, and a grade.

The bounds were calibrated on runs with true effects for every update (benchmarks/trust.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

TRUSTED, DOUBTFUL, NOT_IDENTIFIED = "trusted", "doubtful", "not identified"

GROWTH_TRUSTED, GROWTH_DOUBTFUL = 10.0, 40.0
"""Bounds on the growth of an adjoint or of a displacement."""
UPDATE_TRUSTED, UPDATE_DOUBTFUL = 0.06, 0.25
"""Bounds on the mean relative error of the products that a reverse sweep used."""
STAGE_TRUSTED, STAGE_DOUBTFUL = 0.2, 0.6
"""Bounds on the relative error of the linearised gradient difference along a displacement."""
CHECKPOINTS_TRUSTED, CHECKPOINTS_DOUBTFUL = 0.05, 0.6
"""Bounds on the estimated relative error of a displacement that Krylov segments carried."""
MISMATCH_ALLOWED = 1e-2
"""Above it the differentiable step is not the recorded one, and nothing is trusted."""


@dataclass(frozen=True)
class Trust:
    """The trust in the scores of one update.

    Attributes:
        growth: ||p_{t+1}|| / ||grad gamma||, the largest over behaviours: by how much the training
            after the update amplifies a perturbation of the parameters (e^{eta Lambda (K - t)}).
        displacement: ||Delta_t|| / ||theta_t||, the size of what is propagated (D_S).
        residual: ||C_k w - H_{k+1} w|| / ||H_{k+1} w||, the mean over sampled updates k after t:
            how far the products that the sweep used (C_k w) are from the Hessian's one update
            later. It holds what the propagator leaves out and how fast the curvature changes, the
            Lipschitz constant of Theorem 4.1 at work; nan where no update follows.
        mismatch: the relative distance of the differentiable step from the recorded one; of SGD,
            Adam and AdamW, whose steps are written out, at the next of 16 updates of the run.
        grade: ``"trusted"``, ``"doubtful"`` or ``"not identified"``.
    """

    growth: float
    displacement: float
    residual: float
    mismatch: float
    grade: str


def grade_update(growth: float, residual: float, mismatch: float) -> str:
    """The grade of an update's scores."""
    if not mismatch <= MISMATCH_ALLOWED:
        return NOT_IDENTIFIED
    return _grade(growth, residual, UPDATE_TRUSTED, UPDATE_DOUBTFUL)


def grade_stage(growth: float, residual: float) -> str:
    """The grade of a stage's embedding."""
    return _grade(growth, residual, STAGE_TRUSTED, STAGE_DOUBTFUL)


def grade_checkpoints(growth: float, residual: float) -> str:
    """The grade of a stage's embedding from checkpoints alone.

    What its residual holds is another thing than a recorded stage's, and its bounds were calibrated
    apart (benchmarks/trust_checkpoints.py).
    """
    return _grade(growth, residual, CHECKPOINTS_TRUSTED, CHECKPOINTS_DOUBTFUL)


def _grade(growth: float, residual: float, trusted: float, doubtful: float) -> str:
    if math.isnan(residual) and math.isfinite(growth):
        return TRUSTED  # nothing was linearised after it
    if growth <= GROWTH_TRUSTED and residual <= trusted:
        return TRUSTED
    return DOUBTFUL if growth <= GROWTH_DOUBTFUL and residual <= doubtful else NOT_IDENTIFIED
