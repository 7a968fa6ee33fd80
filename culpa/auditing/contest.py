"""Which stage to replay next, and when the ranking of culprits is settled.

For every behaviour there are two contests: who lowered it most and who raised it most. A contest is
settled when its leader is replayed and no other stage can still beat it: their intervals lie apart.
Until then its leader and its rivals are worth a replay, most the one whose interval is widest
against the spread of all effects (large, doubtful, or close to a tie); the rest is not.
The rule is that of best-arm identification by confidence bounds (Kalyanakrishnan, Tewari, Auer and
Stone, PAC subset selection in stochastic multi-armed bandits, ICML 2012), where replaying an arm
once leaves nothing uncertain but chaos.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SOURCE = (
    "Kalyanakrishnan, Tewari, Auer, Stone, PAC subset selection in stochastic multi-armed bandits, "
    "ICML 2012"
)


FIXED = 0.2
"""Trainings added to every price when worth is compared."""


@dataclass(frozen=True)
class Known:
    """What is known of one stage's effect on one behaviour: value plus or minus ``half``."""

    value: float
    half: float
    replayed: bool


@dataclass(frozen=True)
class Contest:
    """One contest: its leader, those that may still beat it, and whether it is settled.

    ``leader`` is ``None`` where no stage changed the behaviour to this side. A contest is ``tied``
    if only the noise floor keeps it open: every rival is replayed, and replays cannot part them.
    """

    leader: str | None
    rivals: tuple[str, ...]
    settled: bool
    tied: bool


def contest(known: Mapping[str, Known], side: int) -> Contest:
    """The contest for the lowest (``side=-1``) or the highest (``side=1``) effect."""
    reach = {name: side * k.value + k.half for name, k in known.items()}
    sure = {name: side * k.value - k.half for name, k in known.items()}
    in_it = [name for name in known if reach[name] > 0.0 and math.isfinite(known[name].value)]
    if not in_it:
        return Contest(None, (), settled=True, tied=False)
    leader = max(in_it, key=lambda name: (side * known[name].value, known[name].replayed))
    rivals = tuple(n for n in known if n != leader and reach[n] > max(sure[leader], 0.0))
    open_ones = [name for name in (leader, *rivals) if not known[name].replayed]
    settled = known[leader].replayed and not rivals
    return Contest(leader, rivals, settled, tied=not settled and not open_ones)


def urgency(known: Sequence[Mapping[str, Known]]) -> dict[str, float]:
    """By stage what its replay would be worth; stages that no open contest waits for are left out.

    Args:
        known: for each behaviour what is known of every stage.
    """
    worth: dict[str, float] = {}
    for of_behaviour in known:
        values = [k.value for k in of_behaviour.values() if math.isfinite(k.value)]
        spread = max(values, default=0.0) - min(values, default=0.0) or 1.0
        for side in (-1, 1):
            one = contest(of_behaviour, side)
            for name in () if one.settled or one.leader is None else (one.leader, *one.rivals):
                if of_behaviour[name].replayed:
                    continue
                width = min(1.0, 2.0 * of_behaviour[name].half / spread)
                worth[name] = worth.get(name, 0.0) + width + (name == one.leader)
    return worth


def most_urgent_first(
    worth: Mapping[str, float], prices: Mapping[str, float], left: float
) -> list[str]:
    """The stages in the order in which to replay them.

    Where what is ``left`` pays for all of them, by their worth: the fewest replays settle it. Else
    by worth for the price (``FIXED`` keeps a stage that costs nothing from coming first whatever it
    is worth). Of equal ones the cheapest comes first: where nothing is identified, the latest
    stages leave most of the budget for the others.
    """
    scarce = sum(prices[name] for name in worth) > left
    value = {n: round(worth[n] / (prices[n] + FIXED if scarce else 1.0), 9) for n in worth}
    return sorted(worth, key=lambda name: (-value[name], prices[name]))


def settled(known: Mapping[str, Known]) -> bool:
    """Whether both contests for one behaviour are."""
    return contest(known, -1).settled and contest(known, 1).settled
