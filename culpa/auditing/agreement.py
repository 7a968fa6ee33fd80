"""How well an estimate agrees with the truth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from culpa.errors import OptionError


@dataclass(frozen=True)
class Agreement:
    """Agreement of an estimate with the truth over n points.

    Attributes:
        pearson: linear correlation; nan if either side is constant.
        spearman: rank correlation, ties at their mean rank; nan if either side is constant.
        sign: the fraction of points whose sign agrees (zero counts as a sign of its own).
        slope: of the least-squares line truth ~ slope * estimate + c: 1 where the scale is right;
            nan if the estimate is constant.
        relative_error: ||estimate - truth|| / ||truth||; nan if the truth is zero throughout.
        count: n.
    """

    pearson: float
    spearman: float
    sign: float
    slope: float
    relative_error: float
    count: int


def agreement(estimate: Any, truth: Any) -> Agreement:
    """Compare ``estimate`` with ``truth``: tensors, arrays or sequences of one shape, flattened.

    Raises:
        OptionError: if shapes differ, fewer than two points are given, or a value is not finite.
    """
    a, b = _vector(estimate, "estimate"), _vector(truth, "truth")
    if np.shape(estimate) != np.shape(truth):
        raise OptionError(
            f"estimate has shape {np.shape(estimate)}, truth {np.shape(truth)}; they must agree."
        )
    if a.size < 2:
        raise OptionError(f"agreement needs at least two points, got {a.size}.")
    gap, size = float(np.linalg.norm(a - b)), float(np.linalg.norm(b))
    centred = a - a.mean()
    spread = float(centred @ centred)
    return Agreement(
        pearson=_correlation(a, b),
        spearman=_correlation(_ranks(a), _ranks(b)),
        sign=float(np.mean(np.sign(a) == np.sign(b))),
        slope=float(centred @ (b - b.mean())) / spread if spread > 0.0 else float("nan"),
        relative_error=gap / size if size > 0.0 else float("nan"),
        count=int(a.size),
    )


def _vector(values: Any, name: str) -> npt.NDArray[np.float64]:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    vector = np.asarray(values, dtype=np.float64).reshape(-1)
    if not np.isfinite(vector).all():
        raise OptionError(
            f"{name} holds {int((~np.isfinite(vector)).sum())} values that are not finite."
        )
    return vector


def _correlation(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.clip(a @ b / size, -1.0, 1.0)) if size > 0.0 else float("nan")


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Ranks from 0, equal values at the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts + 1) / 2)[inverse]
