"""A run that the first-order sweeps refuse is judged by replays alone, and says so."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import culpa
from culpa.auditing.record import decode, encode
from culpa.report.html import render

STAGES, PER_STAGE, WRONG = 4, 4, 2


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Lion(torch.optim.Optimizer):
    """Chen et al., Symbolic Discovery of Optimization Algorithms: the step is a sign."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                average = state["exp_avg"]
                p.add_((0.9 * average + 0.1 * p.grad).sign(), alpha=-group["lr"])
                average.mul_(0.99).add_(p.grad, alpha=0.01)


def net(kind: str) -> nn.Module:
    torch.manual_seed(4)
    first = nn.Linear(5, 8)
    if kind == "spectral norm":
        first = nn.utils.parametrizations.spectral_norm(first)
    return nn.Sequential(first, nn.Tanh(), nn.Linear(8, 3))


def stepper(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    if kind == "Lion":
        return Lion(model.parameters(), lr=0.02)
    return torch.optim.SGD(model.parameters(), lr=0.2)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def right(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return -cross_entropy(model(batch[0]), batch[1], reduction="none")


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(8)
    centres = 2.0 * torch.randn(3, 5, generator=generator)
    found: list[tuple[Tensor, Tensor]] = []
    for k in range(STAGES * PER_STAGE + 1):
        labels = torch.randint(3, (16,), generator=generator)
        inputs = centres[labels] + torch.randn(16, 5, generator=generator)
        found.append((inputs, (labels + 1) % 3 if k // PER_STAGE == WRONG else labels))
    return found


def trained(kind: str, without: range) -> float:
    """The mean of the behaviour after a plain loop that skips some updates."""
    *training, unseen = batches()
    model = net(kind)
    optimizer = stepper(kind, model)
    for k, batch in enumerate(training):
        if k not in without:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        return float(right(model, unseen).double().mean())


@pytest.mark.parametrize("kind", ["Lion", "spectral norm"])
@pytest.mark.parametrize("budget", [9.0, 0.7])
def test_what_the_sweeps_refuse_rests_on_replays_alone(
    kind: str, budget: float, tmp_path: Path
) -> None:
    *training, unseen = batches()
    model = net(kind)
    optimizer = stepper(kind, model)
    problem = culpa.Problem(model, loss, optimizers=[Lion])
    with culpa.record(tmp_path / "run", problem, optimizer) as recorder:
        for at in range(STAGES):
            with recorder.stage(f"stage {at}"):
                part = training[at * PER_STAGE : (at + 1) * PER_STAGE]
                for batch in recorder.batches(part):
                    optimizer.zero_grad()
                    loss(model, batch).backward()
                    optimizer.step()
    run = culpa.open_run(tmp_path / "run")
    behaviours = [culpa.Behaviour("right", right, unseen)]
    with pytest.raises(culpa.UnsupportedError):
        culpa.attribute(run, problem, behaviours)
    audit = culpa.audit(run, problem, behaviours, budget=budget)
    record = audit.record
    assert record.updates.scores == []
    assert any("no scores of single updates" in caution for caution in record.cautions)
    proved = [s for s in record.stages if s.replayed[0] is not None]
    assert len(proved) == STAGES if budget > 1 else 0 < len(proved) < STAGES
    assert record.used <= budget
    observed = trained(kind, range(0))
    for stage in proved:
        truth = observed - trained(kind, range(stage.start, stage.stop))
        assert stage.replayed[0] == pytest.approx(truth, abs=1e-6)
    for stage in record.stages:
        if stage.replayed[0] is None:  # nothing is claimed of it
            assert stage.grades == ["not identified"]
            assert not math.isfinite(stage.effects[0])
            assert not stage.estimated
            said = next(c for c in record.cautions if c.startswith("Nothing is known of"))
            assert repr(stage.name) in said
    if budget > 1:
        assert f"stage {WRONG}" in record.verdicts[0]
        assert record.settled == [True]
    again = decode(encode(record))
    assert "finite" not in audit.table()
    page = render(again).split("<script", 1)[0]
    assert "This audit scored no single updates." in page
    assert "not finite" not in page
    assert (">not known<" in page) is (budget < 1)
