"""Numbers that tables repeat: correlations over test points, means with their spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from torch import Tensor

from culpa.auditing.agreement import agreement


def pearson(estimate: Tensor, truth: Tensor) -> float:
    """Correlation over test points; 0 where one side is constant or not finite."""
    if not bool(estimate.isfinite().all()):
        return 0.0
    found = agreement(estimate, truth).pearson
    return 0.0 if math.isnan(found) else found


def spread(values: Sequence[float], digits: int = 3, signed: bool = False) -> str:
    """Mean and standard deviation over seeds: ``".994 ± .003"`` as ``"0.994 ± 0.003"``."""
    sign = "+" if signed else ""
    mean = f"{fmean(values):{sign}.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {stdev(values):.{digits}f}"


def of(count: int, total: int) -> str:
    """Such as ``"4 of 5 seeds"``."""
    return f"{count} of {total} seed{'s' * (total != 1)}"


def auc(scores: Tensor, positive: Tensor) -> float:
    """The probability that one marked ``positive`` (bool ``[n]``) scores higher than another."""
    above = scores[positive].unsqueeze(1) - scores[~positive].unsqueeze(0)
    return float(((above > 0).double() + 0.5 * (above == 0).double()).mean())
