"""Stage interactions: every subset is the replay without it, and the game's axioms hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor, nn

import culpa
from culpa.auditing import game
from culpa.auditing.interactions import histories, updates_to_execute
from culpa.progress import Silent
from culpa.trajectory.engine import Engine
from culpa.trajectory.walk import session
from oracles.compare import assert_bitwise, assert_close
from oracles.problems import held_out, log_likelihoods, parameter_sums, seeded, smooth
from oracles.recipes import DECAYING, adamw, sgd
from oracles.recording import Recorded, record
from oracles.retrain import Plan, behaviour_values, parameters_of, retrain

FOUR = (("a", 0, 4), ("b", 4, 6), ("c", 6, 9), ("d", 9, 12))


def noisy_net() -> nn.Module:
    """Draws random numbers and keeps running statistics."""
    return nn.Sequential(
        nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.3), nn.GELU(), nn.Linear(7, 3)
    ).double()


def noisy() -> Plan:
    # Stages begin and end between kept states, where the record holds few generators.
    stages = (("a", 0, 3), ("b", 3, 7), ("c", 7, 10), ("d", 10, 12))
    plan = smooth({0: sgd(momentum=0.9)}, DECAYING, stages)
    return replace(plan, model=seeded(0, noisy_net))


PLANS: dict[str, Callable[[], Plan]] = {
    "momentum": lambda: smooth({0: sgd(momentum=0.9, weight_decay=0.1)}, DECAYING),
    "adamw": lambda: smooth({0: adamw(weight_decay=0.1)}, DECAYING, FOUR),
    "resets": lambda: smooth({0: adamw(), 5: sgd(momentum=0.9), 9: adamw()}, DECAYING),
    "dropout": noisy,
}


def behaviours() -> list[culpa.Behaviour]:
    return [
        culpa.Behaviour("right", log_likelihoods, held_out()),
        culpa.Behaviour("sums", parameter_sums, None, unit="1"),
    ]


class Counting(Silent):
    """How many units were announced, and how many came."""

    def __init__(self) -> None:
        self.total = self.done = 0

    def start(self, what: str, total: int) -> None:
        self.total = total

    def advance(self, units: int = 1) -> None:
        self.done += units


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The index of every update that an engine executes."""
    seen: list[int] = []
    original = Engine.execute

    def execute(engine: Engine, step: Any, batches: Any, randoms: Any, **options: Any) -> Any:
        seen.append(step.index)
        return original(engine, step, batches, randoms, **options)

    monkeypatch.setattr(Engine, "execute", execute)
    return seen


@pytest.mark.parametrize("counterfactual", ["skip", "restart", "zero-gradient"])
@pytest.mark.parametrize("name", PLANS)
def test_every_history_is_the_replay_without_those_stages(
    name: str, counterfactual: str, tmp_path: Path
) -> None:
    recorded = record(PLANS[name](), tmp_path / "run")
    run, problem = recorded.run, recorded.problem
    with session(run, problem) as engine:
        found = dict(histories(run, engine, run.stages, counterfactual, Silent()))
    names = [s.name for s in run.stages]
    assert sorted(found) == list(range(2 ** len(names)))
    asked = behaviours()
    together = culpa.interactions(run, problem, asked, counterfactual=counterfactual)
    for subset, state in found.items():
        gone = [n for i, n in enumerate(names) if not subset >> i & 1]
        alone = culpa.replay(run, problem, without=gone, counterfactual=counterfactual)
        assert_bitwise(state.params, alone.state)
        if alone.buffers:
            assert_bitwise(state.buffers, alone.buffers)
        removed = [float(alone.effect(b).mean()) for b in asked]
        effect = together.values[-1] - together.value(gone)
        assert effect.tolist() == pytest.approx(removed, abs=1e-12)


def test_updates_between_the_stages_are_always_executed(
    tmp_path: Path, executed: list[int]
) -> None:
    plan = smooth({0: sgd(momentum=0.9)}, DECAYING, FOUR)
    recorded = record(plan, tmp_path / "run")
    run, problem = recorded.run, recorded.problem
    executed.clear()
    found = culpa.interactions(run, problem, behaviours(), stages=["d", "b"])
    # a and b once, c in both histories, d in those two of four that have it.
    assert len(executed) == 4 + 2 + 2 * 3 + 2 * 3 - (run.kept_before(4))
    assert found.stages == ("b", "d")
    function, batch = behaviours()[0].function, behaviours()[0].batch
    for gone in ([], ["b"], ["d"], ["b", "d"]):
        updates = [k for stage in gone for k in plan.updates(stage)]
        truth = behaviour_values(retrain(plan, updates).model, function, batch).mean()
        assert float(found.value(gone)[0]) == pytest.approx(float(truth), abs=1e-12)


@pytest.mark.parametrize("counterfactual", ["skip", "zero-gradient"])
@pytest.mark.parametrize("stages", [None, ["first"], ["second", "third"], ["first", "third"]])
def test_what_it_costs_is_said_before_and_far_less_than_separate_replays(
    stages: list[str] | None, counterfactual: str, tmp_path: Path, executed: list[int]
) -> None:
    recorded = record(PLANS["momentum"](), tmp_path / "run")
    run, problem = recorded.run, recorded.problem
    announced = updates_to_execute(run, stages, counterfactual)
    executed.clear()
    watch = Counting()
    found = culpa.interactions(
        run,
        problem,
        behaviours(),
        stages=stages,
        counterfactual=counterfactual,
        progress=watch,
    )
    assert len(executed) == announced == found.updates_executed
    assert watch.done == watch.total > 0
    names = list(found.stages)
    separate = sum(
        culpa.replay(run, problem, without=gone, counterfactual=counterfactual).updates_executed
        for size in range(len(names) + 1)
        for gone in combinations(names, size)
    )
    assert found.separate_updates == separate >= announced
    if stages is None:
        assert announced == 5 + 2 * 4 + 4 * 3


def test_a_run_is_a_game_whose_values_add_up(tmp_path: Path) -> None:
    recorded = record(PLANS["adamw"](), tmp_path / "run")
    run, problem, asked = recorded.run, recorded.problem, behaviours()
    found = culpa.interactions(run, problem, asked)
    assert found.shapley.dtype == found.values.dtype == torch.float64
    nothing = culpa.replay(run, problem, without=list(found.stages))
    whole = torch.stack([nothing.effect(b).mean() for b in asked])
    assert float((found.total - whole).abs().max()) <= 1e-10
    assert float((found.shapley.sum(0) - found.total).abs().max()) <= 1e-10
    single = torch.stack(
        [
            torch.stack([culpa.replay(run, problem, without=n).effect(b).mean() for b in asked])
            for n in found.stages
        ]
    )
    assert_close(found.single, single, 1e-12)
    assert_close(found.residual, single.sum(0) - whole, 1e-10)
    # The run is long enough for single effects not to add up: the test above could have failed.
    assert float(found.residual.abs().min()) > 1e-3
    both = culpa.replay(run, problem, without=["b", "d"])
    for q, b in enumerate(asked):
        pair = single[1, q] + single[3, q] - both.effect(b).mean()
        assert float(found.observed_pairs[1, 3, q]) == pytest.approx(float(pair), abs=1e-12)
        assert float(found.observed_pairs[3, 1, q]) == pytest.approx(float(pair), abs=1e-12)
    text = str(found)
    assert f"{float(found.residual[0]):+.4g}" in text
    assert all(n in text for n in (*found.stages, "right [nats]", "sums [1]", "not additive"))


def test_a_stage_without_learning_is_a_dummy(tmp_path: Path) -> None:
    rates = [(0.0 if 5 <= k < 9 else 0.1,) for k in range(12)]
    recorded = record(smooth({0: sgd()}, rates), tmp_path / "run")
    found = culpa.interactions(recorded.run, recorded.problem, behaviours())
    assert found.shapley[1].tolist() == [0.0, 0.0]
    assert not found.pairs[1].any()
    assert not found.observed_pairs[:, 1].any()
    assert found.shapley[[0, 2]].abs().min() > 1e-4


def test_one_stage_is_its_effect(tmp_path: Path) -> None:
    recorded = record(PLANS["momentum"](), tmp_path / "run")
    found = culpa.interactions(recorded.run, recorded.problem, behaviours(), stages=["second"])
    assert found.pairs.shape == found.observed_pairs.shape == (1, 1, 2)
    assert_bitwise({"phi": found.shapley}, {"phi": found.single})
    assert found.residual.tolist() == [0.0, 0.0]


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    recorded = record(noisy(), tmp_path / "run")
    model = recorded.problem.model
    model.eval()
    before, state = parameters_of(model), torch.get_rng_state()
    culpa.interactions(recorded.run, recorded.problem, behaviours())
    assert_bitwise(parameters_of(model), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training


def games(players: int) -> st.SearchStrategy[Tensor]:
    numbers = st.floats(-10, 10, allow_nan=False, allow_subnormal=False)
    return st.lists(numbers, min_size=2**players, max_size=2**players).map(
        lambda v: torch.tensor(v, dtype=torch.float64)[:, None]
    )


def shapley_by_orders(values: Tensor) -> Tensor:
    """The mean gain over all orders in which players may arrive."""
    players = range(len(values).bit_length() - 1)
    gains = torch.zeros(len(players), values.shape[1], dtype=torch.float64)
    orders = list(permutations(players))
    for order in orders:
        here = 0
        for i in order:
            gains[i] += values[here | 1 << i] - values[here]
            here |= 1 << i
    return gains / len(orders)


def restricted(values: Tensor, players: list[int]) -> Tensor:
    """The game in which only these take part, renumbered."""
    rows = [
        sum(1 << p for at, p in enumerate(players) if s >> at & 1) for s in range(2 ** len(players))
    ]
    return values[rows]


def merged(values: Tensor, i: int, j: int, others: list[int]) -> Tensor:
    """The game in which i and j are one player, the last."""
    rows: list[int] = []
    for s in range(2 ** (len(others) + 1)):
        row = sum(1 << p for at, p in enumerate(others) if s >> at & 1)
        rows.append(row | (1 << i | 1 << j if s >> len(others) & 1 else 0))
    return values[rows]


@hypothesis.given(st.integers(1, 4).flatmap(games))
@hypothesis.settings(max_examples=40)
def test_shapley_values_are_the_mean_over_all_orders(values: Tensor) -> None:
    found = game.shapley_values(values)
    assert float((found - shapley_by_orders(values)).abs().max()) <= 1e-12 * 10
    assert float((found.sum(0) - (values[-1] - values[0])).abs().max()) <= 1e-12 * 10


@hypothesis.given(st.integers(2, 4).flatmap(games))
@hypothesis.settings(max_examples=25)
def test_interactions_obey_the_recursion_of_grabisch_and_roubens(values: Tensor) -> None:
    # I_ij = phi of i and j as one player - phi_i without j - phi_j without i.
    size = len(values).bit_length() - 1
    found = game.interaction_indices(values)
    for i, j in permutations(range(size), 2):
        others = [p for p in range(size) if p not in (i, j)]
        expected = (
            shapley_by_orders(merged(values, i, j, others))[-1]
            - shapley_by_orders(restricted(values, [*others, i]))[-1]
            - shapley_by_orders(restricted(values, [*others, j]))[-1]
        )
        assert float((found[i, j] - expected).abs().max()) <= 1e-11
    assert not found.diagonal().any()


def test_players_that_do_the_same_get_the_same() -> None:
    # Everybody's value depends on how many take part, and player 3 does nothing.
    sizes = torch.tensor([(s & 7).bit_count() ** 2 for s in range(16)], dtype=torch.float64)
    values = torch.stack([sizes, -sizes], 1)
    shares = game.shapley_values(values)
    assert_close(shares[:3], torch.tensor([[3.0, -3.0]] * 3, dtype=torch.float64), 1e-12)
    assert not shares[3].any()
    pairs = game.interaction_indices(values)
    assert float((pairs[0, 1] - torch.tensor([2.0, -2.0])).abs().max()) <= 1e-12
    assert_close(pairs[0, 1], pairs[1, 2], 1e-12)
    assert not pairs[3].any()


def test_unanimity() -> None:
    # Only players 0, 1 and 3 together bring 6: a third each; every pair of them interacts by 6 / 2.
    values = torch.tensor([[6.0 if s & 11 == 11 else 0.0] for s in range(16)], dtype=torch.float64)
    assert game.shapley_values(values)[:, 0].tolist() == pytest.approx([2, 2, 0, 2])
    pairs = game.interaction_indices(values)[:, :, 0]
    assert pairs[0].tolist() == pytest.approx([0, 3, 0, 3])
    # With player 2 in, and so at the end of the game, all of it.
    assert game.last_differences(values)[0, :, 0].tolist() == pytest.approx([0, 6, 0, 6])
    with pytest.raises(culpa.OptionError, match=r"2\^N values"):
        game.shapley_values(values[:12])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return record(PLANS["adamw"](), tmp_path_factory.mktemp("small") / "run")


def test_too_many_stages_are_refused_with_what_they_would_cost(
    small: Recorded, executed: list[int]
) -> None:
    run, problem = small.run, small.problem
    cost = 4 + 2 * 2 + 4 * 3 + 8 * 3
    assert updates_to_execute(run) == cost
    with pytest.raises(culpa.OptionError, match=rf"4 stages would take {cost} updates, 3\.7 times"):
        culpa.interactions(run, problem, behaviours(), max_stages=3)
    assert not executed
    found = culpa.interactions(run, problem, behaviours(), stages=["a", "b"], max_stages=2)
    assert found.stages == ("a", "b")


def test_mistakes_are_named(small: Recorded) -> None:
    run, problem = small.run, small.problem
    with pytest.raises(culpa.StageError, match="no stage 'e'"):
        culpa.interactions(run, problem, behaviours(), stages=["a", "e"])
    with pytest.raises(culpa.StageError, match=r"stages=\['a'\]"):
        culpa.interactions(run, problem, behaviours(), stages="a")
    with pytest.raises(culpa.StageError, match="no stage to remove"):
        culpa.interactions(run, problem, behaviours(), stages=[])
    with pytest.raises(culpa.OptionError, match="list of behaviours"):
        culpa.interactions(run, problem, [])
    with pytest.raises(culpa.OptionError, match="counterfactual must be one of"):
        culpa.interactions(run, problem, behaviours(), counterfactual="undo")
    found = culpa.interactions(run, problem, behaviours(), stages=["a"])
    with pytest.raises(culpa.StageError, match="among those interacting: 'a'"):
        found.value("b")


def test_another_loss_does_not_pass_for_the_recorded_one(small: Recorded) -> None:
    other = culpa.Problem(
        small.problem.model, lambda m, batch: 2 * nn.functional.cross_entropy(m(batch[0]), batch[1])
    )
    with pytest.raises(culpa.IntegrityError, match=r"update 0 .* does not reproduce"):
        culpa.interactions(small.run, other, behaviours())


def test_stages_in_any_order_are_taken_in_order_of_time(small: Recorded) -> None:
    found = culpa.interactions(small.run, small.problem, behaviours(), stages=["c", "a", "c"])
    assert found.stages == ("a", "c")
    whole = culpa.interactions(small.run, small.problem, behaviours())
    for gone in ([], ["a"], ["c"], ["c", "a", "c"]):
        assert_bitwise({"v": found.value(gone)}, {"v": whole.value(gone)})
