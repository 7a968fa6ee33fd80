"""Every scheduler of torch, as loops call it: each update's hyperparameters are those recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler

import culpa
from oracles.compare import assert_bitwise, assert_tree_close, difference
from oracles.loops import Loop, Open, assert_modelled, assert_replayed
from oracles.problems import cross_entropy, held_out, log_likelihoods, seeded, smooth
from oracles.recipes import DECAYING, sgd
from oracles.retrain import parameters_of

BATCHES = smooth({0: sgd()}, DECAYING).batches
STAGES = (("first", 0, 4), ("second", 4, 7), ("third", 7, 9))

Build = Callable[[Optimizer], Any]
SCHEDULERS: dict[str, Build] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda k: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5], 0.3),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.CosineAnnealingLR(o, 6)], [3]
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 9, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 9, 0.001),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, base_momentum=0.5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.01, anneal_epochs=4),
}
NOT_SCHEDULERS = {"LRScheduler"}
METRICS = [3.0, 2.0, 2.1, 2.2, 2.3, 1.0, 1.1, 1.2, 1.3]
"""What a plateau is judged by: given, since a retrained loop would measure something else."""


def test_every_scheduler_of_this_torch_is_tried() -> None:
    there = {
        name
        for name, value in vars(lr_scheduler).items()
        if isinstance(value, type)
        and issubclass(value, lr_scheduler.LRScheduler)
        and not name.startswith("_")
    }
    assert there - NOT_SCHEDULERS - SCHEDULERS.keys() == set()


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3)).double()


def problem(model: nn.Module) -> culpa.Problem:
    return culpa.Problem(model, cross_entropy)


def loop(build: Build, make: Callable[[nn.Module], Optimizer], every: bool = True) -> Loop:
    """A scheduler stepped after every update, or (``every=False``) after every stage."""

    def train(model: nn.Module, opened: Open) -> None:
        optimizer = make(model)
        scheduler = build(optimizer)

        def advance(k: int) -> None:
            plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*([METRICS[k]] if plateau else []))

        with opened(problem(model), optimizer, scheduler=scheduler) as driver:
            for name, start, stop in STAGES:
                with driver.stage(name):
                    for k, batch in enumerate(driver.batches(BATCHES[start:stop]), start):
                        optimizer.zero_grad()
                        cross_entropy(model, batch).backward()
                        optimizer.step()
                        if every:
                            advance(k)
                if not every:
                    advance(start)

    return Loop(seeded(0, net), train, problem, log_likelihoods, held_out())


def momentum(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.05, momentum=0.9)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_a_scheduler(name: str, tmp_path: Path) -> None:
    one = loop(SCHEDULERS[name], momentum)
    run, again = assert_replayed(one, tmp_path / "run")
    rates = {run.step(k).hypers[0]["lr"] for k in range(9)}
    assert len(rates) > 1, "the schedule is flat: the test shows nothing"
    if name in ("OneCycleLR", "CyclicLR", "LinearLR"):  # momentum moves too, in two of them
        assert_modelled(one, run, again, first_order=0.3)
        return
    found = culpa.embed(run, again, propagator=culpa.Secant(1))
    end = parameters_of(one.retrain())
    for stage in run.stages:
        without = parameters_of(one.retrain(stage.updates))
        assert_tree_close(found[stage.name], difference(end, without), 1e-9)


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_a_schedule_of_momentum_too(name: str, tmp_path: Path) -> None:
    run, _ = loop(SCHEDULERS[name], momentum).record(tmp_path / "run")
    assert len({run.step(k).hypers[0]["momentum"] for k in range(9)}) > 2


def test_a_schedule_of_betas(tmp_path: Path) -> None:
    def adam(model: nn.Module) -> Optimizer:
        return AdamW(model.parameters(), lr=0.01, eps=1e-4)

    one = loop(SCHEDULERS["OneCycleLR"], adam)
    run, again = assert_replayed(one, tmp_path / "run")
    assert len({tuple(run.step(k).hypers[0]["betas"]) for k in range(9)}) > 2
    found = culpa.embed(run, again, propagator=culpa.Secant(1))
    end = parameters_of(one.retrain())
    without = parameters_of(one.retrain(range(4)))
    assert_tree_close(found["first"], difference(end, without), 1e-8)


def test_a_scheduler_that_steps_between_stages(tmp_path: Path) -> None:
    run, _ = assert_replayed(
        loop(lambda o: lr_scheduler.ExponentialLR(o, 0.5), momentum, every=False), tmp_path / "run"
    )
    assert [run.step(k).hypers[0]["lr"] for k in (0, 4, 8)] == [0.05, 0.025, 0.0125]


CLOSURES = {"SGD": momentum, "AdamW": lambda m: AdamW(m.parameters(), lr=0.01, eps=1e-4)}


@pytest.mark.parametrize("name", list(CLOSURES))
def test_closures(name: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Dropout(0.3), nn.Linear(7, 3)).double()

    def train(model: nn.Module, opened: Open) -> None:
        optimizer = CLOSURES[name](model)
        with opened(problem(model), optimizer) as driver:
            for stage, start, stop in STAGES:
                with driver.stage(stage):
                    for batch in driver.batches(BATCHES[start:stop]):

                        def closure(batch: Any = batch) -> Tensor:
                            optimizer.zero_grad()
                            value = cross_entropy(model, batch)
                            value.backward()
                            return value

                        optimizer.step(closure)

    one = Loop(seeded(0, build), train, problem, log_likelihoods, held_out())
    run, again = assert_replayed(one, tmp_path / "run")
    found = culpa.embed(run, again, propagator=culpa.Secant(1))
    expected = difference(parameters_of(one.retrain()), parameters_of(one.retrain(range(4))))
    assert_tree_close(found["first"], expected, 1e-8)
    if name == "SGD":
        assert_modelled(one, run, again, first_order=0.2)  # a rate of .05


def test_the_optimizer_cleared_between_stages_is_a_fresh_one(tmp_path: Path) -> None:
    def train(model: nn.Module, opened: Open) -> None:
        optimizer = momentum(model)
        with opened(problem(model), optimizer) as driver:
            for name, start, stop in STAGES:
                optimizer.state.clear()
                with driver.stage(name):
                    for batch in driver.batches(BATCHES[start:stop]):
                        optimizer.zero_grad()
                        cross_entropy(model, batch).backward()
                        optimizer.step()

    one = Loop(seeded(0, net), train, problem, log_likelihoods, held_out())
    run, again = assert_replayed(one, tmp_path / "run")
    assert [run.step(stage.start).reset for stage in run.stages] == [False, True, True]
    assert_modelled(one, run, again, first_order=0.1)  # a rate of .05
    assert_bitwise(
        culpa.replay(run, again, without="first", counterfactual="restart").state,
        parameters_of(one.retrain(range(4))),
    )
