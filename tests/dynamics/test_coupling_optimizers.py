"""Optimizers that users wrote whose steps mix coordinates, parameters, or other classes' steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import AdamW, Optimizer

import culpa
from oracles.compare import assert_bitwise, pearson
from oracles.problems import STAGES, held_out, log_likelihoods, smooth
from oracles.retrain import Plan, retrain, set_groups, true_effects


class Lars(Optimizer):
    """You et al. 1708.03888: every matrix moves by a part of its own norm."""

    def __init__(self, params: Any, lr: float, beta: float = 0.8) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["mean"] = torch.zeros_like(p)
                trust = (p.norm() + 0.1) / (p.grad.norm() + 0.1)
                state["mean"].mul_(group["beta"]).add_(trust * p.grad)
                p.add_(state["mean"], alpha=-group["lr"])


class Globally(Lars):
    """Every parameter moves by a rate that all gradients together decide."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None]
            size = torch.stack([p.grad.square().sum() for p in held]).sum().sqrt()  # type: ignore[union-attr]
            for p in held:
                p.add_(p.grad / (0.05 + size), alpha=-group["lr"])  # type: ignore[operator]


class Pulled(AdamW):
    """More happens after the step of the class that it is made from."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        found = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1 - 0.1 * group["lr"])
        return found


class Sharp(Lars):
    """Foret et al. 2010.01412 (SAM): the gradient is taken at the worst point nearby."""

    def step(self, closure: Any = None) -> None:
        held = [p for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            size = torch.stack([p.grad.norm() for p in held]).norm() + 1e-12
            moves = [0.05 * p.grad / size for p in held]
            for p, move in zip(held, moves, strict=True):
                p.add_(move)
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            for p, move in zip(held, moves, strict=True):
                p.sub_(move)
                p.sub_(p.grad, alpha=self.param_groups[0]["lr"])


RATES = {Lars: 2e-3, Globally: 2e-3, Pulled: 2e-3}


def recorded(kind: type[Optimizer], path: Path) -> tuple[Plan, Any, Any]:
    """The plan, the run, and a problem whose model is at other weights."""
    # torch calls hooks around a class's step once there was an instance of that very class: then
    # the step inside of Pulled's has them too.
    AdamW([torch.zeros(1, requires_grad=True)])
    rate, build = RATES[kind], kind
    plan = smooth({0: lambda model: build(model.parameters(), lr=rate)}, [(rate,)] * 12)  # type: ignore[call-arg]
    model = plan.model()
    problem = culpa.Problem(model, plan.loss, optimizers=(kind,))
    optimizer = plan.optimizers[0](model)
    with culpa.record(path, problem, optimizer) as recorder:
        for name, start, stop in plan.stages:
            with recorder.stage(name):
                for k, batch in enumerate(recorder.batches(plan.batches[start:stop]), start):
                    set_groups(plan, k, optimizer)
                    optimizer.zero_grad()
                    plan.loss(model, batch).backward()
                    optimizer.step()
    other = plan.model()
    for p in other.parameters():
        p.data.mul_(-1.5)
    return plan, culpa.open_run(path), culpa.Problem(other, plan.loss, optimizers=(kind,))


@pytest.mark.parametrize("kind", RATES)
def test_recorded_and_replayed_bit_for_bit(kind: type[Optimizer], tmp_path: Path) -> None:
    plan, run, problem = recorded(kind, tmp_path / "run")
    whole = retrain(plan).parameters
    assert run.num_steps == 12
    assert_bitwise(run.final_state(), whole)
    assert_bitwise(culpa.replay(run, problem).state, whole)
    without = culpa.replay(run, problem, without="second")
    assert_bitwise(without.state, retrain(plan, plan.updates("second")).parameters)
    run.verify(problem, level="replay")


@pytest.mark.parametrize("kind", [Lars, Pulled])
def test_scores_and_effects_are_those_of_retraining(kind: type[Optimizer], tmp_path: Path) -> None:
    plan, run, problem = recorded(kind, tmp_path / "run")
    inputs, targets = held_out()
    asked = [
        culpa.log_likelihood(f"point {i}", (inputs[i : i + 1], targets[i : i + 1]))
        for i in range(len(targets))
    ]
    scores = culpa.attribute(run, problem, asked)
    truth = true_effects(plan, [[k] for k in range(12)], log_likelihoods, (inputs, targets))
    assert pearson(scores.steps.reshape(-1), truth.reshape(-1)) > 0.9
    whole = true_effects(
        plan, [plan.updates(n) for n, _, _ in STAGES], log_likelihoods, (inputs, targets)
    )
    found = culpa.embed(run, problem).effect(culpa.log_likelihood("all", (inputs, targets)))
    assert pearson(found.reshape(-1), whole.reshape(-1)) > 0.99


def test_a_coupling_of_parameters_is_noticed_and_no_score_trusted(tmp_path: Path) -> None:
    _, run, problem = recorded(Globally, tmp_path / "run")
    scores = culpa.attribute(run, problem, [culpa.log_likelihood("all", held_out())])
    assert {one.grade for one in scores.trust} == {"not identified"}
    assert min(one.mismatch for one in scores.trust) > 0.05


def test_an_optimizer_that_evaluates_the_loss_itself_is_refused(tmp_path: Path) -> None:
    plan = smooth({0: lambda model: Sharp(model.parameters(), lr=1e-2)}, [(1e-2,)] * 12)
    model = plan.model()
    optimizer = plan.optimizers[0](model)

    def train() -> None:
        problem = culpa.Problem(model, plan.loss, optimizers=(Sharp,))
        with culpa.record(tmp_path / "run", problem, optimizer) as recorder:
            for batch in recorder.batches(plan.batches):

                def closure(batch: Any = batch) -> None:
                    optimizer.zero_grad()
                    plan.loss(model, batch).backward()

                closure()
                optimizer.step(closure)

    with pytest.raises(culpa.RecordError, match=r"update 0.*without a closure.*SAM"):
        train()
