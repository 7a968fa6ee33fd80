"""Several counterfactuals at once: against retraining, which shares nothing with the library."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import culpa
from culpa.estimators.side_by_side import replay_many
from oracles import normalised
from oracles.compare import assert_bitwise, assert_tree_close
from oracles.problems import cross_entropy, seeded, smooth
from oracles.recipes import DECAYING, adamw, sgd, two_adamw_groups, two_groups
from oracles.recording import record
from oracles.retrain import Plan, retrain

REMOVED: list[Any] = ["second", [2, 9], "first", [], [0, 1, 2, 3, 5, 11], "third"]
TWO_RATES = [(0.05, 0.02)] * 12
PLANS = {
    "sgd": lambda: smooth({0: sgd(momentum=0.9, weight_decay=0.1)}, DECAYING),
    "sgd, dampened": lambda: smooth({0: sgd(momentum=0.9, dampening=0.3)}, DECAYING),
    "sgd, two groups": lambda: smooth({0: two_groups}, TWO_RATES),
    "sgd, then another": lambda: smooth({0: sgd(momentum=0.9), 5: adamw()}, DECAYING),
    "adamw": lambda: smooth({0: adamw(amsgrad=True)}, DECAYING),
    "adamw, two groups": lambda: smooth({0: two_adamw_groups}, TWO_RATES),
}


def _updates(plan: Plan, one: Any) -> list[int]:
    return list(plan.updates(one) if isinstance(one, str) else one)


CASES = [(name, "skip") for name in PLANS] + [
    (name, other)
    for name in ("sgd, then another", "adamw")
    for other in ("restart", "zero-gradient")
]


@pytest.mark.parametrize(("name", "counterfactual"), CASES)
def test_equal_to_retraining_without_each(name: str, counterfactual: Any, tmp_path: Path) -> None:
    plan = PLANS[name]()
    recorded = record(plan, tmp_path / "run")
    found = replay_many(
        recorded.run,
        recorded.problem,
        REMOVED,
        counterfactual=counterfactual,
        side_by_side=True,
    )
    assert found.how == "side by side"
    for one, without in zip(found, REMOVED, strict=True):
        truth = retrain(plan, _updates(plan, without), counterfactual)
        assert_tree_close(one.state, truth.parameters, 1e-10)
        assert one.without == tuple(_updates(plan, without))
        assert one.claim.startswith("drift ")  # never bitwise


def test_clipping_is_each_lane_s_own(tmp_path: Path) -> None:
    plan = replace(smooth({0: sgd(momentum=0.9)}, DECAYING), clip_grad_norm=0.3)
    recorded = record(plan, tmp_path / "run", clip_grad_norm=0.3)
    found = replay_many(recorded.run, recorded.problem, ["first", "second"], side_by_side=True)
    for one, name in zip(found, ["first", "second"], strict=True):
        assert_tree_close(one.state, retrain(plan, plan.updates(name)).parameters, 1e-10)


def test_running_statistics_are_each_lane_s_own(tmp_path: Path) -> None:
    plan = normalised.plan({0: sgd(momentum=0.9)}, DECAYING, normalised.make())
    recorded = record(plan, tmp_path / "run")
    names = [name for name, _, _ in plan.stages]
    found = replay_many(recorded.run, recorded.problem, names, side_by_side=True)
    for one, name in zip(found, names, strict=True):
        truth = retrain(plan, plan.updates(name))
        assert_tree_close(one.state, truth.parameters, 1e-10)
        assert_tree_close(one.buffers, truth.buffers, 1e-10)


def _recorded(path: Path, model: nn.Module, loss: Any = cross_entropy) -> Any:
    """Eight updates in two stages, float32, two micro-batches each."""
    problem = culpa.Problem(model, loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(1)
    with culpa.record(path, problem, optimizer) as recorder:
        for name in ("one", "two"):
            with recorder.stage(name):
                for _ in range(4):
                    inputs = torch.randn(2, 6, 5, generator=generator)
                    targets = torch.randint(0, 3, (2, 6), generator=generator)
                    batches = list(zip(inputs, targets, strict=True))
                    with recorder.step(*batches):
                        optimizer.zero_grad()
                        for batch in batches:
                            (loss(model, batch) / 2).backward()
                        optimizer.step()
    return culpa.open_run(path), problem


def _net(*between: nn.Module) -> nn.Module:
    return seeded(
        2, lambda: nn.Sequential(nn.Linear(5, 16), nn.GELU(), *between, nn.Linear(16, 3))
    )()


def test_the_drift_is_that_of_the_lane_that_removes_nothing(tmp_path: Path) -> None:
    run, problem = _recorded(tmp_path / "run", _net())
    before = {n: p.detach().clone() for n, p in problem.model.named_parameters()}
    one, two, none = replay_many(run, problem, ["one", "two", []], side_by_side=True)
    assert_bitwise(dict(problem.model.named_parameters()), before)
    final = run.final_state()
    gap = sum(float((none.state[n] - v).double().square().sum()) for n, v in final.items())
    size = sum(float(v.double().square().sum()) for v in final.values())
    drift = float(one.claim.removeprefix("drift "))
    assert drift == pytest.approx((gap / size) ** 0.5, rel=0.05)
    assert drift < 1e-5
    for found, name in ((one, "one"), (two, "two")):
        assert_tree_close(found.state, culpa.replay(run, problem, without=name).state, 1e-5)


def test_one_after_the_other_is_bitwise(tmp_path: Path) -> None:
    run, problem = _recorded(tmp_path / "run", _net())
    found = replay_many(run, problem, ["one", [5]], side_by_side=False)
    assert found.how == "one after the other: asked for"
    for one, without in zip(found, (["one"], [5]), strict=True):
        assert one.claim == "bitwise"
        assert_bitwise(one.state, culpa.replay(run, problem, without=without).state)


def _branching(model: nn.Module, batch: Any) -> torch.Tensor:
    value = cross_entropy(model, batch)
    return value if float(value.detach()) > 0 else 2 * value


@pytest.mark.parametrize(
    ("between", "loss", "said"),
    [
        ([nn.Dropout(0.5)], cross_entropy, "drew random numbers"),
        ([], _branching, "vmap cannot take the loss"),
    ],
)
def test_what_vmap_cannot_do_is_said(
    between: list[nn.Module], loss: Any, said: str, tmp_path: Path
) -> None:
    run, problem = _recorded(tmp_path / "run", _net(*between), loss)
    with pytest.raises(culpa.UnsupportedError, match=said):
        replay_many(run, problem, ["one", "two"], side_by_side=True)
    found = replay_many(run, problem, ["one", "two"])
    assert said in found.how
    assert [one.claim for one in found] == ["bitwise", "bitwise"]


def test_auto_says_what_it_measured(tmp_path: Path) -> None:
    run, problem = _recorded(tmp_path / "run", _net())
    found = replay_many(run, problem, ["one", "two"])
    assert "of the time" in found.how
    sideways = found.how.startswith("side by side")
    assert all(one.claim.startswith("drift") == sideways for one in found)


def test_another_loss_is_noticed(tmp_path: Path) -> None:
    run, problem = _recorded(tmp_path / "run", _net())
    other = culpa.Problem(problem.model, lambda m, b: 1.01 * cross_entropy(m, b))
    with pytest.raises(culpa.IntegrityError, match="update 0"):
        replay_many(run, other, ["one", "two"], side_by_side=True)


@pytest.mark.parametrize("wrong", [{"side_by_side": "always"}, {"without": "one"}])
def test_wrong_arguments_are_named(wrong: dict[str, Any], tmp_path: Path) -> None:
    run, problem = _recorded(tmp_path / "run", _net())
    with pytest.raises(culpa.OptionError, match=next(iter(wrong))):
        replay_many(run, problem, **{"without": ["one"], **wrong})
