"""The noise floor against what it stands for: calm training forgets rounding, wild training not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import culpa


def trained(folder: Path, rate: float) -> tuple[culpa.Run, culpa.Problem, culpa.Behaviour]:
    torch.manual_seed(3)
    inputs, targets = torch.randn(240, 6), torch.randint(3, (240,))
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 3))
    problem = culpa.Problem(model, lambda m, b: cross_entropy(m(b[0]), b[1]))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    with culpa.record(folder, problem, optimizer) as recorder:
        for _ in range(4):
            for batch in recorder.batches(
                list(zip(inputs.split(12), targets.split(12), strict=True))
            ):
                optimizer.zero_grad()
                problem.loss(model, batch).backward()
                optimizer.step()
    unseen = (torch.randn(50, 6), torch.randint(3, (50,)))
    return culpa.open_run(folder), problem, culpa.log_likelihood("right", unseen)


def test_calm_and_wild_training(tmp_path: Path) -> None:
    run, problem, behaviour = trained(tmp_path / "calm", 1e-2)
    calm = culpa.noise_floor(run, problem, [behaviour], repeats=2)
    wild_run, wild_problem, wild_behaviour = trained(tmp_path / "wild", 3.0)
    wild = culpa.noise_floor(wild_run, wild_problem, [wild_behaviour], repeats=2)
    assert calm.effects.shape == (2, 1)
    assert float(calm.spread) < 1e-4
    assert float(wild.spread) > 1e-2
    effect = culpa.replay(run, problem, without=range(10)).effect(behaviour).mean()
    assert calm.hides(effect.reshape(1)) == [False]
    assert calm.hides(torch.zeros(1, dtype=torch.float64)) == [True]


def test_no_disturbance_has_no_effect(tmp_path: Path) -> None:
    # Dropout included: the replay draws the recorded masks.
    run, problem, behaviour = trained(tmp_path / "run", 1e-2)
    for at in (0, 37):
        found = culpa.noise_floor(run, problem, [behaviour], at=at, repeats=1, size=0.0)
        assert float(found.effects.abs().max()) == 0.0


def test_every_repeat_draws_what_the_observed_run_drew(tmp_path: Path) -> None:
    run, problem, behaviour = trained(tmp_path / "run", 1e-2)
    # Where the record keeps no generators: they go on from the update before.
    assert run.step(37).drew_randomness
    assert run.randoms_of(37) == [None]

    def drawing(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        torch.rand(())
        return behaviour.function(model, batch)

    between = culpa.Behaviour("draws between the repeats", drawing, behaviour.batch)
    found = culpa.noise_floor(run, problem, [between], at=37, repeats=3, size=0.0)
    assert found.effects.tolist() == [[0.0], [0.0], [0.0]]


def test_outside_of_the_run(tmp_path: Path) -> None:
    run, problem, behaviour = trained(tmp_path / "run", 1e-2)
    with pytest.raises(culpa.OptionError, match="80"):
        culpa.noise_floor(run, problem, [behaviour], at=80)
    with pytest.raises(culpa.OptionError, match="repeats=0"):
        culpa.noise_floor(run, problem, [behaviour], repeats=0)
