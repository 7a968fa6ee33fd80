"""Two optimizers over disjoint parameters that step in every update, and other loops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

import culpa
from oracles.compare import assert_bitwise
from oracles.loops import Loop, Open, assert_modelled, assert_replayed
from oracles.problems import cross_entropy, held_out, log_likelihoods, seeded, smooth
from oracles.recipes import DECAYING, sgd
from oracles.retrain import parameters_of

BATCHES = smooth({0: sgd()}, DECAYING).batches
STAGES = (("first", 0, 4), ("second", 4, 7), ("third", 7, 9))


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3)).double()


def problem(model: nn.Module) -> culpa.Problem:
    return culpa.Problem(model, cross_entropy)


def pair(model: nn.Module) -> list[Optimizer]:
    """SGD with two groups over a layer, AdamW over the other."""
    return [
        SGD([{"params": [model[0].weight], "momentum": 0.9}, {"params": [model[0].bias]}], lr=0.02),
        AdamW(model[2].parameters(), lr=1e-3, eps=1e-2),
    ]


def twins(model: nn.Module) -> list[Optimizer]:
    """Two of one class with other options."""
    return [
        SGD(model[0].parameters(), lr=0.02, momentum=0.9, nesterov=True),
        SGD(model[2].parameters(), lr=0.01, momentum=0.5, weight_decay=0.1),
    ]


def train(model: nn.Module, opened: Open, build: Callable[[nn.Module], list[Optimizer]]) -> None:
    optimizers = build(model)
    schedulers = [StepLR(optimizers[0], 3, 0.5), CosineAnnealingLR(optimizers[1], 9)]
    with opened(problem(model), optimizers, scheduler=schedulers) as driver:
        for name, start, stop in STAGES:
            with driver.stage(name):
                for batch in driver.batches(BATCHES[start:stop]):
                    for optimizer in optimizers:
                        optimizer.zero_grad()
                    cross_entropy(model, batch).backward()
                    for optimizer in reversed(optimizers):
                        optimizer.step()
                    for scheduler in schedulers:
                        scheduler.step()


@pytest.mark.parametrize("build", [pair, twins])
def test_two_optimizers(build: Callable[[nn.Module], list[Optimizer]], tmp_path: Path) -> None:
    def both(model: nn.Module, opened: Open) -> None:
        train(model, opened, build)

    loop = Loop(seeded(0, net), both, problem, log_likelihoods, held_out())
    run, again = assert_replayed(loop, tmp_path / "run")
    classes = [type(one).__name__ for one in build(net())]
    assert run.step(0).optimizer.name == " + ".join(classes)
    held = {name: g.optimizer for g in run.step(0).groups for name in g.names}
    assert (held["0.weight"], held["2.weight"]) == tuple(classes)
    assert_modelled(loop, run, again)


def test_each_may_clear_its_gradients_as_soon_as_it_has_stepped(tmp_path: Path) -> None:
    def in_turn(model: nn.Module, opened: Open) -> None:
        optimizers = pair(model)
        with opened(problem(model), optimizers) as driver:
            for batch in driver.batches(BATCHES):
                cross_entropy(model, batch).backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()

    loop = Loop(seeded(0, net), in_turn, problem, log_likelihoods, held_out())
    run, again = assert_replayed(loop, tmp_path / "run")
    assert all(run.step(k).without_gradient == () for k in range(run.num_steps))
    assert_modelled(loop, run, again)


def test_another_pair_takes_over_and_then_one(tmp_path: Path) -> None:
    def changing(model: nn.Module, opened: Open) -> None:
        optimizers = pair(model)
        with opened(problem(model), optimizers) as driver:
            for name, start, stop in STAGES:
                if name == "second":
                    optimizers = twins(model)
                if name == "third":
                    optimizers = [SGD(model.parameters(), lr=0.01, momentum=0.9)]
                given = {"optimizer": optimizers} if start else {}
                with driver.stage(name, **given):
                    for batch in driver.batches(BATCHES[start:stop]):
                        model.zero_grad()
                        cross_entropy(model, batch).backward()
                        for optimizer in optimizers:
                            optimizer.step()

    loop = Loop(seeded(0, net), changing, problem, log_likelihoods, held_out())
    run, again = assert_replayed(loop, tmp_path / "run")
    assert [run.step(s.start).reset for s in run.stages] == [False, True, True]
    assert_modelled(loop, run, again)


def test_a_run_of_two_optimizers_and_their_schedulers_is_resumed(tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    def attempt(model: nn.Module, until: int | None) -> None:
        optimizers = pair(model)
        schedulers = [StepLR(optimizers[0], 3, 0.5), CosineAnnealingLR(optimizers[1], 9)]
        with culpa.record(
            tmp_path / "run", problem(model), optimizers, scheduler=schedulers, resume=True
        ) as recorder:
            for name, start, stop in STAGES:
                with recorder.stage(name):
                    for k, batch in enumerate(recorder.batches(BATCHES[start:stop]), start):
                        if k == until:
                            raise StopError
                        model.zero_grad()
                        cross_entropy(model, batch).backward()
                        for part in (*optimizers, *schedulers):
                            part.step()

    with pytest.raises(StopError):
        attempt(seeded(0, net)(), 5)
    model, plain = seeded(0, net)(), seeded(0, net)()
    attempt(model, None)
    Loop(lambda: plain, lambda m, o: train(m, o, pair), problem, log_likelihoods, None).retrain()
    assert_bitwise(parameters_of(model), parameters_of(plain))


def half_made(tmp_path: Path, sequence: Callable[[int], list[int]]) -> None:
    """Record updates in which those optimizers step, by number, that ``sequence(k)`` lists."""
    model = net()
    optimizers = pair(model)
    with culpa.record(tmp_path / "run", problem(model), optimizers) as recorder:
        for k, batch in enumerate(recorder.batches(BATCHES)):
            model.zero_grad()
            cross_entropy(model, batch).backward()
            for number in sequence(k):
                optimizers[number].step()


SEQUENCES: dict[str, Callable[[int], list[int]]] = {
    "one only": lambda k: [0, 1] if k < 3 else [0],
    "one twice": lambda k: [0, 1] if k < 3 else [0, 0, 1],
    "in turn": lambda k: [k % 2],
    "one only, at the end": lambda k: [0, 1] if k < len(BATCHES) - 1 else [1],
}


@pytest.mark.parametrize("name", list(SEQUENCES))
def test_an_update_in_which_one_of_them_does_not_step(name: str, tmp_path: Path) -> None:
    with pytest.raises(culpa.RecordError, match=r"is half made: (SGD|AdamW) has stepped and "):
        half_made(tmp_path, SEQUENCES[name])
    run = culpa.open_run(tmp_path / "run")
    assert run.manifest.status == "interrupted"
    assert run.num_steps == {"in turn": 0, "one only, at the end": 11}.get(name, 3)
    run.verify(problem(net()), level="replay")


def test_a_loop_that_goes_backward_between_the_steps(tmp_path: Path) -> None:
    model = net()
    optimizers = pair(model)

    def attempt() -> None:
        with culpa.record(tmp_path / "run", problem(model), optimizers) as recorder:
            for batch in recorder.batches(BATCHES):
                for optimizer in optimizers:
                    model.zero_grad()
                    cross_entropy(model, batch).backward()
                    optimizer.step()

    with pytest.raises(culpa.RecordError, match="update 0 is not what the record would say"):
        attempt()


def test_the_state_of_one_of_them_cleared(tmp_path: Path) -> None:
    model = net()
    optimizers = [Adam(model[0].parameters(), lr=1e-3), AdamW(model[2].parameters(), lr=1e-3)]

    def attempt() -> None:
        with culpa.record(tmp_path / "run", problem(model), optimizers) as recorder:
            for k, batch in enumerate(recorder.batches(BATCHES)):
                if k == 3:
                    optimizers[1].state.clear()
                model.zero_grad()
                cross_entropy(model, batch).backward()
                for optimizer in optimizers:
                    optimizer.step()

    with pytest.raises(culpa.RecordError, match="the state of AdamW was cleared, and that of the"):
        attempt()


def test_a_parameter_that_both_hold_is_refused(tmp_path: Path) -> None:
    model = net()
    both = [SGD(model.parameters(), lr=0.1), SGD(model[2].parameters(), lr=0.1)]
    with (
        pytest.raises(culpa.ProblemError, match="two of the optimizers hold the same parameter"),
        culpa.record(tmp_path / "run", problem(model), both),
    ):
        pass
    with (
        pytest.raises(culpa.OptionError, match="a list of them, got an empty list"),
        culpa.record(tmp_path / "run", problem(model), []),
    ):
        pass


def test_lbfgs_in_a_pair_is_refused(tmp_path: Path) -> None:
    model = net()
    both = [SGD(model[0].parameters(), lr=0.1), torch.optim.LBFGS(model[2].parameters())]
    with (
        pytest.raises(culpa.UnsupportedError, match="LBFGS"),
        culpa.record(tmp_path / "run", problem(model), both),
    ):
        pass
