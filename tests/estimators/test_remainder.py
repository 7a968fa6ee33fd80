"""What the measured remainders stand for, and that the residual made of them is the error made."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

import culpa
from culpa.estimators.remainder import probes
from culpa.trajectory.schema import Stage
from oracles.compare import difference, flat, relative_gap
from oracles.problems import smooth
from oracles.recipes import adamw
from oracles.recording import record
from oracles.retrain import retrain


@given(stop=st.integers(1, 50), left=st.integers(0, 400))
def test_remainders_stand_for_every_update_once(stop: int, left: int) -> None:
    (found,) = probes([Stage("s", 0, stop)], stop + left).values()
    assert sum(found.values()) == left
    assert len(found) == min(left, 6)
    # In order, each inside of the part it stands for; the first part is the first update.
    low = stop
    for at, (k, part) in enumerate(sorted(found.items())):
        assert low <= k < low + part
        assert part == 1 if at == 0 else part > 0
        low += part


def test_an_optimizer_that_starts_anew_does_not_spoil_the_first_stage(tmp_path: Path) -> None:
    # Without the first stage Adam's first step, of the rate's size whatever the gradient, comes
    # later. Counted as if every sixth update were like it, the residual is 8 times the true error.
    plan = smooth({0: adamw()}, [(0.003,)] * 80, [("a", 0, 8), ("b", 8, 80)], 3, 16)
    recorded = record(plan, tmp_path / "run")
    truth = flat(difference(retrain(plan).parameters, retrain(plan, range(8)).parameters))
    ratios = list[float]()
    for seed in range(4):
        found = culpa.embed(
            recorded.run, recorded.problem, stages=["a"], propagator=culpa.Secant(0.5, seed)
        )
        ratios.append(found.trust["a"].residual / relative_gap(flat(found["a"]), truth))
    assert 0.4 < sum(ratios) / 4 < 5.0, ratios
