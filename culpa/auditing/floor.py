"""The noise floor of an audit: placebos, as a causal study has them, and what they hide.

In chaotic training any disturbance re-draws the rest of the run. The effect of leaving out a stage
is one such draw from the moment on at which training goes on without it, the stage's end; so it is
held against placebos at that moment or, where none is affordable there, at the nearest one:

* rounding: the parameters are disturbed by noise of the size of their rounding and the rest of
  history is replayed; the truth is that nothing happened;
* neutral update: a single update with next to no score is skipped; what happens beyond its score
  is unexplained. It is a check of the scores, and shown; it is no part of the floor.

The floor is the two-sided 95 % quantile of Student's t with n degrees of freedom times the root
mean square of n rounding placebos, whose mean is zero by construction: 12.7 times a single one,
4.3 times two, 2.6 times five. An effect inside of it cannot be told from chaos.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from culpa.auditing.record import PlaceboFinding

ROUNDING, NEUTRAL = "rounding", "neutral update"
SHARE = 0.25
"""Of the budget, at most this part is set aside for placebos before anything else is replayed."""
MOST = 5
"""Placebos at one moment: beyond it the quantile hardly falls."""
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def student(degrees: float) -> float:
    """The 97.5 % quantile of Student's t, from a table; within 0.5 % beyond 10 degrees.

    Degrees that are no whole number are rounded down.
    """
    whole = int(degrees)
    if whole < 1:
        return math.inf
    return _T95[whole - 1] if whole <= len(_T95) else 1.96 + 2.72 / whole


def floor_at(
    placebos: Sequence[PlaceboFinding], moment: int, behaviour: int, num_steps: int
) -> float:
    """The half-width inside of which an effect on ``behaviour`` is chaos; nan without a placebo.

    Args:
        placebos: those made so far.
        moment: the update at which history goes on differently. The latest moment at or before it
            that has placebos is used (more training follows, so chaos is no smaller), else the
            earliest after it, unless less than half as much training follows that.
        behaviour: its number.
        num_steps: of the run.
    """
    placebos = [p for p in placebos if p.kind == ROUNDING]
    moments = sorted({p.at for p in placebos})
    at = max((m for m in moments if m <= moment), default=min(moments, default=num_steps))
    if at == num_steps or not stands_for(at, moment, num_steps):
        return math.nan
    effects = [p.effects[behaviour] for p in placebos if p.at == at]
    mean_square = sum(e * e for e in effects) / len(effects)
    return student(len(effects)) * math.sqrt(mean_square)


def stands_for(at: int, moment: int, num_steps: int) -> bool:
    """Whether a placebo before update ``at`` tells of disturbances at ``moment``."""
    return 2 * (num_steps - at) >= num_steps - moment


def hidden(effect: float, floor: float) -> bool:
    """Whether an effect lies inside of the floor. Exactly zero is no draw: nothing changed."""
    return 0.0 < abs(effect) <= floor
