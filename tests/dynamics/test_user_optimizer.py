"""Optimizers that users wrote, in the styles they write them in."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import culpa
from culpa.dynamics.updates.probe import why_not
from oracles.compare import assert_bitwise, pearson
from oracles.problems import STAGES, held_out, log_likelihoods, smooth
from oracles.retrain import Plan, retrain, set_groups, true_effects


class Plain(Optimizer):
    """Under no_grad, in place, state made on the way, a count as a plain number."""

    def __init__(self, params: Any, lr: float, beta: float = 0.8) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["count"] = 0
                    state["warm"] = 0.5
                    state["mean"] = torch.zeros_like(p)
                    state["square"] = torch.zeros_like(p)
                state["count"] += 1
                state["warm"] = 0.5 * state["warm"] + 0.5
                state["mean"].mul_(group["beta"]).add_(p.grad, alpha=1 - group["beta"])
                state["square"].mul_(0.9).addcmul_(p.grad, p.grad, value=0.1)
                root = (state["square"] / (1 - 0.9 ** state["count"])).sqrt_().add_(1e-3)
                p.addcdiv_(state["mean"], root, value=-group["lr"] * state["warm"])
        return loss


class ByData(Plain):
    """As old code does: ``.data`` everywhere, buffers from clones, a norm as a number."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, grad = self.state[p], p.grad.data
                if "buffer" not in state:
                    state["buffer"] = torch.clone(grad).detach()
                else:
                    state["buffer"].mul_(group["beta"]).add_(grad)
                size = state["buffer"].norm().item()
                p.data = p.data - group["lr"] / (0.1 + size) * state["buffer"]


class Eager(Plain):
    """State from the start: a slow copy of the weights (Lookahead)."""

    def __init__(self, params: Any, lr: float, pull: float = 0.3) -> None:
        Optimizer.__init__(self, params, {"lr": lr, "pull": pull})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["slow"] = p.detach().clone()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    slow = self.state[p]["slow"]
                    p -= group["lr"] * p.grad
                    slow += group["pull"] * (p - slow)
                    p.copy_(0.5 * (slow + p))


class Child(torch.optim.AdamW):
    """A subclass of a class of torch: the gradient centred before each step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.ndim > 1:
                    p.grad = p.grad - p.grad.mean(dim=1, keepdim=True)
        return super().step(closure)


class Lion(Plain):
    """Chen et al., Symbolic Discovery of Optimization Algorithms, 2302.06675."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state["mean"] = torch.zeros_like(p)
                    mixed = group["beta"] * state["mean"] + (1 - group["beta"]) * p.grad
                    p.mul_(1 - group["lr"] * 0.1).add_(mixed.sign(), alpha=-group["lr"])
                    state["mean"].lerp_(p.grad, 0.01)


class Outside(Plain):
    """Whose step leaves torch for NumPy."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"] / (0.1 + self.size(p.grad)))

    @staticmethod
    def size(grad: torch.Tensor) -> float:
        return float(np.linalg.norm(grad.detach().numpy()))


class Unseen(Outside):
    """Whose step leaves torch without anybody noticing."""

    @staticmethod
    def size(grad: torch.Tensor) -> float:
        return float(grad.norm())


RATES = {Plain: 2e-3, ByData: 2e-3, Eager: 0.05, Child: 2e-3, Lion: 1e-4, Outside: 2e-3}
SMOOTH = (Plain, ByData, Eager, Child)


def plan_of(kind: type[Optimizer]) -> Plan:
    rate = RATES[kind]
    build: Any = kind
    return smooth({0: lambda model: build(model.parameters(), lr=rate)}, [(rate,)] * 12)


def recorded(kind: type[Optimizer], path: Path, closure: bool = False) -> tuple[Plan, Any, Any]:
    """The plan, the run, and a problem whose model is at other weights."""
    plan = plan_of(kind)
    model = plan.model()
    problem = culpa.Problem(model, plan.loss, optimizers=(kind,))
    optimizer = plan.optimizers[0](model)

    def train(batch: Any) -> torch.Tensor:
        optimizer.zero_grad()
        loss = plan.loss(model, batch)
        loss.backward()
        return loss

    with culpa.record(path, problem, optimizer) as recorder:
        for name, start, stop in plan.stages:
            with recorder.stage(name):
                for k, batch in enumerate(recorder.batches(plan.batches[start:stop]), start):
                    set_groups(plan, k, optimizer)
                    if closure:
                        optimizer.step(partial(train, batch))
                    else:
                        train(batch)
                        optimizer.step()
    other = plan.model()
    for p in other.parameters():
        p.data.mul_(-1.5)
    return plan, culpa.open_run(path), culpa.Problem(other, plan.loss, optimizers=(kind,))


@pytest.mark.parametrize("kind", RATES)
def test_recorded_and_replayed_bit_for_bit(kind: type[Optimizer], tmp_path: Path) -> None:
    plan, run, problem = recorded(kind, tmp_path / "run")
    assert_bitwise(culpa.replay(run, problem).state, retrain(plan).parameters)
    without = culpa.replay(run, problem, without="second")
    assert_bitwise(without.state, retrain(plan, plan.updates("second")).parameters)


def test_numbers_in_the_state_come_back_as_numbers(tmp_path: Path) -> None:
    _, run, problem = recorded(Plain, tmp_path / "run")
    slots = run.state(run.num_steps).slots
    assert set(slots) == {"count:int", "warm:float", "mean", "square"}
    assert {int(v) for v in slots["count:int"].values()} == {12}
    assert {float(v) for v in slots["warm:float"].values()} == {1 - 0.5**13}
    run.verify(problem, level="replay")


def test_a_step_with_a_closure(tmp_path: Path) -> None:
    plan, run, problem = recorded(Plain, tmp_path / "run", closure=True)
    assert_bitwise(culpa.replay(run, problem).state, retrain(plan).parameters)


@pytest.mark.parametrize("kind", SMOOTH)
def test_scores_and_effects_are_those_of_retraining(kind: type[Optimizer], tmp_path: Path) -> None:
    plan, run, problem = recorded(kind, tmp_path / "run")
    inputs, targets = held_out()
    asked = [
        culpa.log_likelihood(f"point {i}", (inputs[i : i + 1], targets[i : i + 1]))
        for i in range(len(targets))
    ]
    scores = culpa.attribute(run, problem, asked).steps
    truth = true_effects(plan, [[k] for k in range(12)], log_likelihoods, (inputs, targets))
    assert pearson(scores.reshape(-1), truth.reshape(-1)) > 0.9
    removals = [plan.updates(n) for n, _, _ in STAGES]
    whole = true_effects(plan, removals, log_likelihoods, (inputs, targets))
    everything = culpa.log_likelihood("all", (inputs, targets))
    found = culpa.embed(run, problem).effect(everything)
    assert pearson(found.reshape(-1), whole.reshape(-1)) > 0.999


def test_sign_steps_are_replayed_and_embedded_by_differences_only(tmp_path: Path) -> None:
    plan, run, problem = recorded(Lion, tmp_path / "run")
    behaviour = culpa.log_likelihood("all", held_out())
    for refused in (
        lambda: culpa.attribute(run, problem, [behaviour]),
        lambda: culpa.embed(run, problem, propagator=culpa.Exact()),
    ):
        with pytest.raises(culpa.UnsupportedError, match=r"Lion.*signs.*replay.*Secant"):
            refused()
    found = culpa.embed(run, problem, propagator=culpa.Secant(1.0)).effect(behaviour)
    removals = [plan.updates(n) for n, _, _ in STAGES]
    truth = true_effects(plan, removals, log_likelihoods, held_out())
    torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "reason"), [(Outside, "cannot follow its step"), (Unseen, "outside of torch")]
)
def test_a_step_that_leaves_torch_is_found_out(kind: type[Optimizer], reason: str) -> None:
    assert reason in why_not(kind, {"lr": 1e-2, "beta": 0.5})


@pytest.mark.parametrize("kind", [Plain, Child])
def test_recording_needs_the_class(kind: type[Optimizer], tmp_path: Path) -> None:
    plan = plan_of(kind)
    model = plan.model()
    problem = culpa.Problem(model, plan.loss)
    advice = rf"{kind.__name__}.*not a class of torch\.optim.*optimizers=\({kind.__name__},\)"
    with (
        pytest.raises(culpa.UnsupportedError, match=advice),
        culpa.record(tmp_path / "run", problem, plan.optimizers[0](model)),
    ):
        pass
    assert not (tmp_path / "run").exists()


def test_opening_elsewhere_says_what_to_pass(tmp_path: Path) -> None:
    plan, run, problem = recorded(Plain, tmp_path / "run")
    for others in ((), (Child,)):
        without = culpa.Problem(problem.model, plan.loss, optimizers=others)
        with pytest.raises(culpa.UnsupportedError, match=r"Plain.*optimizers=\(Plain,\)"):
            culpa.replay(run, without)
        with pytest.raises(culpa.UnsupportedError, match=r"Plain.*optimizers=\(Plain,\)"):
            culpa.attribute(run, without, [culpa.log_likelihood("all", held_out())])


class Nested(Plain):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["past"] = [p.grad]


class Global(Plain):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        shared: Any = self.state
        shared["all"]["count"] = 1


class Demanding(Plain):
    def __init__(self, params: Any, lr: float, budget: int) -> None:
        super().__init__(params, lr)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: Nested(p, 0.1), r"keeps a list in its state slot 'past'"),
        (lambda p: Global(p, 0.1), r"keeps state under 'all', which is no parameter"),
        (lambda p: Demanding(p, 0.1, 3), r"Demanding could not be built again.*budget"),
    ],
)
def test_states_that_cannot_be_kept(build: Any, message: str, tmp_path: Path) -> None:
    model = nn.Linear(2, 1)

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().mean()

    optimizer = build(model.parameters())
    problem = culpa.Problem(model, loss, optimizers=(type(optimizer),))

    def train() -> None:
        with culpa.record(tmp_path / "run", problem, optimizer) as recorder:
            for batch in recorder.batches([torch.ones(3, 2)]):
                loss(model, batch).backward()
                optimizer.step()

    with pytest.raises(culpa.UnsupportedError, match=message):
        train()


def test_the_problem_takes_classes_of_optimizers() -> None:
    model = nn.Linear(2, 1)
    # Without the test hook, which knows annotations: a user has none.
    unhooked: Any = inspect.unwrap(culpa.Problem.__init__)
    problem = object.__new__(culpa.Problem)
    for wrong in (torch.nn.Linear, torch.optim.SGD(model.parameters())):
        with pytest.raises(culpa.OptionError, match=r"optimizers.*subclasses"):
            unhooked(problem, model, lambda model, batch: model(batch).sum(), optimizers=(wrong,))
