"""A culprit planted among a thousand updates is found by few replays; segments where they are."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import culpa
from culpa.auditing.find import find_updates
from culpa.auditing.record import BehaviourFacts, StageFinding
from culpa.auditing.segments import segments_of
from culpa.auditing.verdicts import tradeoffs

UPDATES, CULPRIT = 1000, 900


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(batches: list[tuple[torch.Tensor, torch.Tensor]], model: nn.Module) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for batch in batches:
        optimizer.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
    return model


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


@pytest.fixture(scope="module")
def planted(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[culpa.Run, culpa.Problem, culpa.Behaviour, float]:
    """A run with one batch of shifted labels and large inputs; and its effect, by retraining."""
    generator = torch.Generator().manual_seed(3)
    centres = 1.5 * torch.randn(4, 8, generator=generator)

    def data(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.randint(4, (count,), generator=generator)
        return centres[labels] + torch.randn(count, 8, generator=generator), labels

    batches = [data(8) for _ in range(UPDATES)]
    inputs, labels = batches[CULPRIT]
    batches[CULPRIT] = (20.0 * inputs, (labels + 1) % 4)
    unseen = data(300)
    model = net()
    problem = culpa.Problem(model, lambda m, b: cross_entropy(m(b[0]), b[1]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    path = tmp_path_factory.mktemp("planted") / "run"
    with culpa.record(path, problem, optimizer) as recorder:
        for batch in recorder.batches(batches):
            optimizer.zero_grad()
            problem.loss(model, batch).backward()
            optimizer.step()
    values: list[float] = []
    for some in (batches, batches[:CULPRIT] + batches[CULPRIT + 1 :]):
        with torch.no_grad():
            trained = train_with_grad(some)
            values.append(-float(cross_entropy(trained(unseen[0]), unseen[1])))
    behaviour = culpa.log_likelihood("right", unseen)
    return culpa.open_run(path), problem, behaviour, values[0] - values[1]


@torch.enable_grad()
def train_with_grad(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> nn.Module:
    return train(batches, net())


def test_a_culprit_among_a_thousand_updates_within_one_training(
    planted: tuple[culpa.Run, culpa.Problem, culpa.Behaviour, float],
) -> None:
    run, problem, behaviour, truth = planted
    assert truth < -1e-3
    found = find_updates(run, problem, [behaviour], budget=1.0)
    assert found.culprits[0].start == CULPRIT
    assert found.culprits[0].replayed == [pytest.approx(truth, abs=1e-6)]
    assert found.used <= 1.0
    assert found.replays <= 3


def test_group_tests_alone_find_it_with_about_two_log_k_replays(
    planted: tuple[culpa.Run, culpa.Problem, culpa.Behaviour, float],
) -> None:
    run, problem, behaviour, truth = planted
    within = range(744, UPDATES)
    found = find_updates(run, problem, [behaviour], within=within, budget=9.0, observe=False)
    assert found.culprits[0].start == CULPRIT
    assert found.culprits[0].replayed == [pytest.approx(truth, abs=1e-6)]
    assert found.replays <= 8 + 2 * math.ceil(math.log2(len(within) / 8))
    widths = [w.stop - w.start for w in found.windows]
    assert widths[0] == len(within) // 8
    assert widths[-1] == 1


def test_what_cannot_be_searched_is_refused(
    planted: tuple[culpa.Run, culpa.Problem, culpa.Behaviour, float],
) -> None:
    run, problem, behaviour, _ = planted
    with pytest.raises(culpa.OptionError, match="side='both'"):
        find_updates(run, problem, [behaviour], side="both")
    with pytest.raises(culpa.OptionError, match="0 to 999"):
        find_updates(run, problem, [behaviour], within=range(990, 1001))
    assert find_updates(run, problem, [behaviour], budget=0.0).replays == 0


def test_segments_are_where_the_scores_change() -> None:
    pytest.importorskip("ruptures", reason="needs: pip install 'culpa[segments]'")
    draw = np.random.default_rng(0)
    steps = draw.normal(0.0, 1.0, (300, 2))
    steps[100:160, 0] -= 2.0
    steps[220:, 1] += 2.0
    steps[50] = [1e6, -1e6]  # one update is no stage
    steps[60] = np.nan
    found = segments_of(steps)
    edges = [stage.start for stage in found[1:]]
    assert len(edges) == 3
    assert np.abs(np.array(edges) - [100, 160, 220]).max() <= 4
    assert found[0].name == f"updates 0-{found[0].stop - 1}"
    assert [s.start for s in found] == [0, *(s.stop for s in found[:-1])]
    assert found[-1].stop == 300
    assert segments_of(steps * 1e-9) == found, "the unit does not matter"


def test_noise_is_one_segment_and_odd_arguments_are_refused() -> None:
    pytest.importorskip("ruptures", reason="needs: pip install 'culpa[segments]'")
    noise = np.random.default_rng(1).normal(0.0, 1.0, (400, 3))
    assert len(segments_of(noise)) == 1
    assert len(segments_of(np.zeros((50, 1)))) == 1
    assert segments_of(np.zeros((0, 1))) == ()
    for wrong in ({"penalty": -1.0}, {"min_size": 0}):
        with pytest.raises(culpa.OptionError):
            segments_of(noise, **wrong)  # pyright: ignore[reportArgumentType]


def stage(name: str, *effects: float, grade: str = "replayed") -> StageFinding:
    values = list(effects)
    return StageFinding(
        name=name,
        start=0,
        stop=1,
        scores=values,
        effects=values,
        replayed=[*values],
        grade="trusted",
        reason="",
        displacement=0.0,
        growth=1.0,
        residual=0.0,
        grades=[grade] * len(values),
    )


def test_tradeoffs_name_what_was_bought_and_what_was_paid() -> None:
    facts = [BehaviourFacts(name=n, unit="nats", value=0.0, count=1) for n in ("skill", "bias gap")]
    stages = [stage("both up", 1.0, 2.0), stage("trade", 0.8, -0.5), stage("slight", 1.0, -0.01)]
    (said,) = tradeoffs(stages, facts)
    assert said == ("Stage 'trade' bought +0.8 nats of skill at the price of 0.5 nats of bias gap.")
    chaotic = [stages[0], stage("trade", 0.8, -0.5, grade="not identified")]
    assert tradeoffs(chaotic, facts) == []
