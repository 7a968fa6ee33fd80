"""Smoothed scores: the sweeps along perturbed trajectories are those of such trainings."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import culpa
from culpa.estimators.smoothing import Smoothing, Trajectory, summarise
from culpa.trajectory.walk import session
from oracles import unrolled
from oracles.compare import assert_bitwise, assert_close
from oracles.problems import held_out, log_likelihoods, smooth
from oracles.recipes import DECAYING, TWINS
from oracles.recording import Recorded, record
from oracles.retrain import Plan, retrain


def asked() -> list[culpa.Behaviour]:
    return [culpa.log_likelihood("right", held_out()), culpa.log_likelihood("other", held_out(1))]


def starting_at(plan: Plan, params: dict[str, Tensor]) -> nn.Module:
    model = plan.model()
    model.load_state_dict(params)
    return model


def starts(recorded: Recorded, smoothing: Smoothing) -> list[dict[str, Tensor]]:
    return [state.params for state in smoothing.starts(recorded.run)]


@pytest.mark.parametrize("name", ["adamw", "nesterov-decay"])
def test_along_each_trajectory_it_is_the_unrolled_derivative(name: str, tmp_path: Path) -> None:
    build, rule = TWINS[name]
    stages = [("first", 0, 5), ("second", 5, 12)]
    plan = smooth({0: build, 5: build}, DECAYING, stages)  # an optimizer replaced on the way
    recorded = record(plan, tmp_path / "run", checkpoints=culpa.All())
    smoothing = Smoothing(4, relative=0.1, seed=5)
    exact = culpa.Exact()
    scores = culpa.attribute(
        recorded.run, recorded.problem, asked(), propagator=exact, smoothing=smoothing
    )
    rates = [rates[0] for rates in plan.rates]
    rows: list[Tensor] = []
    for params in (plan.model().state_dict(), *starts(recorded, smoothing)):
        trace = unrolled.unroll(
            starting_at(plan, params), plan.loss, plan.batches, rates, {0: rule, 5: rule}
        )
        each = [unrolled.step_scores(trace, log_likelihoods, held_out(q)) for q in range(2)]
        rows.append(torch.stack(each, dim=1))
    plain = culpa.attribute(recorded.run, recorded.problem, asked(), propagator=exact)
    assert_close(plain.steps, rows[0], 1e-8)
    assert plain.spread is None
    # By hand: of five, the third largest; and the third largest distance from that.
    ordered = torch.stack(rows).sort(dim=0).values
    assert_close(scores.steps, ordered[2], 1e-8)
    assert scores.spread is not None
    away = (torch.stack(rows) - ordered[2]).abs().sort(dim=0).values[2]
    assert_close(scores.spread, 1.4826 * away, 1e-7)
    assert_close(scores.stages[1], ordered[2][5:].sum(0), 1e-8)
    assert scores.trust[:-1] == plain.trust[:-1]
    # The perturbation matters: otherwise all of this would be said of one trajectory.
    assert float((rows[1] - rows[0]).norm()) > 1e-2 * float(rows[0].norm())


def test_a_perturbation_of_zero_changes_nothing(tmp_path: Path) -> None:
    build, _ = TWINS["adamw"]
    recorded = record(smooth({0: build}, DECAYING), tmp_path / "run")
    plain = culpa.attribute(recorded.run, recorded.problem, asked(), examples=True)
    for count in (1, 3):
        scores = culpa.attribute(
            recorded.run,
            recorded.problem,
            asked(),
            examples=True,
            smoothing=Smoothing(count, relative=0.0),
        )
        assert torch.equal(scores.steps, plain.steps)
        assert torch.equal(scores.stages, plain.stages)
        assert scores.examples is not None
        assert plain.examples is not None
        assert torch.equal(scores.examples, plain.examples)
        assert scores.spread is not None
        assert float(scores.spread.abs().max()) == 0.0


def test_the_trajectory_ends_where_training_from_there_ends(tmp_path: Path) -> None:
    # Bit for bit, from torch's own loop; the perturbation is as large as it says.
    build, _ = TWINS["momentum-decay"]
    plan = smooth({0: build}, DECAYING)
    recorded = record(plan, tmp_path / "run")
    smoothing = Smoothing(2, relative=0.01, seed=1)
    found = starts(recorded, smoothing)
    first = plan.model().state_dict()
    for name, value in first.items():
        size = (found[0][name] - value).square().mean() / value.square().mean()
        assert 0.2e-4 < float(size) < 3e-4
        assert not torch.equal(found[0][name], found[1][name])
    for start, state in zip(smoothing.starts(recorded.run), found, strict=True):
        model = starting_at(plan, state)
        changed = Plan(
            lambda model=model: model,
            plan.loss,
            plan.optimizers,
            plan.batches,
            plan.rates,
            plan.stages,
        )
        with session(recorded.run, recorded.problem) as engine:
            path = Trajectory(recorded.run, engine, start)
            way = list(path.backward())
        assert [transition.index for transition in way] == list(reversed(range(12)))
        assert_bitwise(path.final.params, retrain(changed).parameters)
        assert_bitwise(way[0].after.params, path.final.params)
        for later, earlier in itertools.pairwise(way):
            assert_bitwise(earlier.after.params, later.before.params)


def dropped_out(folder: Path) -> tuple[culpa.Run, culpa.Problem]:
    torch.manual_seed(3)
    inputs, targets = torch.randn(90, 5, dtype=torch.float64), torch.randint(3, (90,))
    layers = [nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)]
    model = nn.Sequential(*layers).double()
    problem = culpa.Problem(model, lambda m, b: cross_entropy(m(b[0]), b[1]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with culpa.record(folder, problem, optimizer) as recorder:
        for batch in recorder.batches(list(zip(inputs.split(6), targets.split(6), strict=True))):
            optimizer.zero_grad()
            problem.loss(model, batch).backward()
            optimizer.step()
    return culpa.open_run(folder), problem


def test_masks_are_those_of_the_observed_run(tmp_path: Path) -> None:
    run, problem = dropped_out(tmp_path / "run")
    assert run.randoms_of(7) == [None]  # drawn on from the update before
    plain = culpa.attribute(run, problem, asked())
    scores = culpa.attribute(run, problem, asked(), smoothing=Smoothing(2, relative=0.0))
    assert torch.equal(scores.steps, plain.steps)
    assert scores.spread is not None
    assert float(scores.spread.max()) == 0.0


def test_memory_grows_like_the_square_root(tmp_path: Path) -> None:
    # Every state is kept on disk, and no more than two segments' in memory.
    build, _ = TWINS["plain"]
    plan = smooth({0: build}, [(0.01,)] * 49, [("all", 0, 49)], batch_size=2)
    recorded = record(plan, tmp_path / "run", checkpoints=culpa.All())
    with session(recorded.run, recorded.problem) as engine:
        (start,) = Smoothing(1).starts(recorded.run)
        path = Trajectory(recorded.run, engine, start)
        assert len(path.boundaries) == 7
        assert path.boundaries.step == 7


def test_the_seed_decides(tmp_path: Path) -> None:
    build, _ = TWINS["plain"]
    recorded = record(smooth({0: build}, DECAYING), tmp_path / "run")
    first, same, other = (starts(recorded, Smoothing(1, seed=seed))[0] for seed in (0, 0, 1))
    assert_bitwise(first, same)
    assert not torch.equal(first["0.weight"], other["0.weight"])


def test_the_median_of_trajectories() -> None:
    scores = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1e9, -3.0], [4.0, 1.0]], dtype=torch.float64)
    middle, spread = summarise(scores)
    assert middle.tolist() == [3.0, 0.0]
    assert spread.tolist() == pytest.approx([1.4826 * 1.5, 1.4826 * 0.5])


@pytest.mark.parametrize(
    "options",
    [{"trajectories": 0}, {"trajectories": True}, {"relative": -1e-3}, {"relative": math.nan}],
)
def test_bad_numbers_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(culpa.OptionError, match=next(iter(options))):
        Smoothing(**options)
