"""Stages where none were named: consecutive updates whose scores differ from their surroundings.

Change points of the mean of the scores, all behaviours together, by PELT (Killick, Fearnhead and
Eckley, Optimal detection of changepoints with a linear computational cost, JASA 2012) as the
package ``ruptures`` has it (Truong, Oudre and Vayatis, Selective review of offline change point
detection methods, Signal Processing 2020). Every column is divided by the scale of its noise,
estimated from the differences of neighbours, and clipped, so that one update does not make a stage
of its own; a change must lower the squared error by more than ``penalty``.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from culpa.errors import OptionError, UnsupportedError
from culpa.estimators.adjoint import Scores
from culpa.trajectory.schema import Stage

SOURCE = (
    "Killick, Fearnhead, Eckley, Optimal detection of changepoints with a linear computational "
    "cost, JASA 2012; Truong, Oudre, Vayatis, Selective review of offline change point detection "
    "methods, Signal Processing 2020"
)
CLIP = 4.0
"""Scores further from the median than this many scales count as this many."""
CAUTIOUS = 3.0
"""The default penalty over that of the Bayesian information criterion: scores are correlated."""


def segments(
    scores: Scores, *, penalty: float | None = None, min_size: int | None = None
) -> tuple[Stage, ...]:
    """Group consecutive updates whose scores differ from their surroundings.

    Args:
        scores: what ``culpa.attribute`` returned.
        penalty: what a further stage must improve the squared error by, in units of the variance
            of the noise. Default: 3 (1 + Q) log K for K updates and Q behaviours.
        min_size: of a stage, in updates. Default: a fiftieth of the run, at least 3.

    Returns:
        Stages named by their updates (``"updates 0-59"``), in order of time, covering the run; a
        single one where nothing changes. Cost: linear in K, milliseconds.

    Raises:
        OptionError: for a negative penalty or a size below 1.
        UnsupportedError: if ``ruptures`` is not installed.
    """
    return segments_of(scores.steps.numpy(), penalty=penalty, min_size=min_size)


def segments_of(
    steps: npt.NDArray[np.float64], *, penalty: float | None = None, min_size: int | None = None
) -> tuple[Stage, ...]:
    """``segments`` of a matrix ``[updates, behaviours]``."""
    count, width = steps.shape
    size = max(3, count // 50) if min_size is None else min_size
    cost = CAUTIOUS * (1 + width) * math.log(max(count, 2)) if penalty is None else penalty
    if size < 1 or not cost >= 0.0:
        raise OptionError(
            f"segments takes a penalty >= 0 and a size >= 1; got {penalty=} and {min_size=}."
        )
    edges = [0, *_changes(_standardised(steps), cost, size), count] if count else []
    return tuple(Stage(f"updates {a}-{b - 1}", a, b) for a, b in itertools.pairwise(edges))


def _changes(signal: npt.NDArray[np.float64], penalty: float, size: int) -> list[int]:
    if len(signal) < 2 * size:
        return []
    try:
        import ruptures  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as error:
        raise UnsupportedError(
            "segments needs ruptures, which is not installed. Run: pip install 'culpa[segments]'. "
            "Or name the stages when recording: with recorder.stage(name)."
        ) from error
    search: Any = ruptures.KernelCPD(kernel="linear", min_size=size)
    return [int(k) for k in search.fit(signal).predict(pen=penalty)[:-1]]


def _standardised(steps: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Columns in units of their noise, about their median; what is not finite is at the median."""
    columns = np.where(np.isfinite(steps), steps, np.nan)
    with np.errstate(all="ignore"):
        centred = np.nan_to_num(columns - np.nanmedian(columns, axis=0), nan=0.0)
    jumps = np.abs(np.diff(centred, axis=0)) if len(centred) > 1 else np.ones_like(centred)
    # Of a normal variable the median absolute difference of two is 0.954 standard deviations.
    noise = np.median(jumps, axis=0) / 0.954
    noise = np.where(noise > 0.0, noise, np.maximum(np.abs(centred).max(axis=0), 1e-300))
    return np.clip(centred / noise, -CLIP, CLIP)
