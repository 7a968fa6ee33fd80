"""Exact replay: bit for bit what was trained, and what retraining without would have given."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler
from torch.utils.data import DataLoader, TensorDataset

import culpa
from oracles.compare import assert_bitwise, assert_close
from oracles.problems import (
    affine,
    cross_entropies,
    cross_entropy,
    held_out,
    log_likelihoods,
    seeded,
    smooth,
)
from oracles.recipes import DECAYING, adam, adamw, rates_for, sgd, two_adamw_groups, two_groups
from oracles.recording import record
from oracles.retrain import (
    Counterfactual,
    Plan,
    behaviour_values,
    buffers_of,
    parameters_of,
    retrain,
    set_groups,
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ----------------------------------------------------------------------------------------------
# Live loops of every kind: nothing removed


def plain_net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 3))


def dropout_net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 16), nn.Dropout(0.4), nn.ReLU(), nn.Linear(16, 3))


def batchnorm_net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def everything_net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 8),
        nn.BatchNorm1d(8),
        nn.Dropout(0.3),
        nn.GELU(),
        nn.LayerNorm(8),
        nn.Linear(8, 3),
    )


class Tied(nn.Module):
    """Encoder and decoder share one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(5, 5, bias=False)
        self.middle = nn.GELU()
        self.decoder = nn.Linear(5, 5)
        self.decoder.weight = self.encoder.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.decoder(self.middle(self.encoder(inputs)))


class FrozenStatistics(nn.Module):
    """Fine-tuning as it is done: batch norm stays in evaluation mode, whatever train() says."""

    def __init__(self) -> None:
        super().__init__()
        self.net = batchnorm_net()

    def train(self, mode: bool = True) -> FrozenStatistics:
        super().train(mode)
        self.net[1].eval()  # type: ignore[index]
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)


def sgd_(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)


def adamw_(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=0.01)


def data(seed: int, rows: int = 24) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, 5, generator=generator)
    return TensorDataset(inputs, torch.randint(0, 3, (rows,), generator=generator))


@dataclass(frozen=True)
class Live:
    """A loop as people write them."""

    net: Callable[[], nn.Module] = plain_net
    optimizer: Callable[[nn.Module], Optimizer] = sgd_
    scheduler: Callable[[Optimizer], LRScheduler] | None = None
    shuffle: bool = False
    epochs: int = 1
    evaluate: bool = False
    """Whether evaluation, sampling and logging code runs between two updates."""
    clip: float | None = None
    drop_last: bool = True
    extras: dict[str, Any] = field(default_factory=dict)

    def train(self, path: Path | None) -> nn.Module:
        """Run the loop, recorded unless ``path`` is None."""
        torch.manual_seed(11)
        model = self.net()
        optimizer = self.optimizer(model)
        scheduler = self.scheduler(optimizer) if self.scheduler else None
        context: Any = nullcontext()
        if path is not None:
            problem = culpa.Problem(model, cross_entropy)
            context = culpa.record(
                path,
                problem,
                optimizer,
                scheduler=scheduler,
                clip_grad_norm=self.clip,
                **self.extras,
            )
        with context as recorder:
            for number, name in enumerate(("first", "second")):
                loader = DataLoader(
                    data(number), batch_size=5, shuffle=self.shuffle, drop_last=self.drop_last
                )
                with recorder.stage(name) if recorder else nullcontext():
                    for _ in range(self.epochs):
                        batches: Iterable[Any] = recorder.batches(loader) if recorder else loader
                        for batch in batches:
                            model.train()
                            optimizer.zero_grad()
                            cross_entropy(model, batch).backward()
                            if self.clip is not None:
                                nn.utils.clip_grad_norm_(model.parameters(), self.clip)
                            optimizer.step()
                            if scheduler:
                                scheduler.step()
                            if self.evaluate:
                                self.look(model)
        return model

    @staticmethod
    def look(model: nn.Module) -> None:
        model.eval()
        with torch.no_grad():
            model(torch.randn(4, 5))
        torch.rand(3)
        random.random()
        np.random.rand()  # noqa: NPY002


LIVE: dict[str, Live] = {
    "plain": Live(),
    "dropout": Live(net=dropout_net, epochs=2),
    "batchnorm": Live(net=batchnorm_net, epochs=2),
    "frozen-statistics": Live(net=FrozenStatistics, epochs=2, evaluate=True),
    "adamw": Live(optimizer=adamw_, epochs=2),
    "adam": Live(optimizer=adam(weight_decay=0.01)),
    "amsgrad": Live(optimizer=adamw(amsgrad=True)),
    "groups": Live(optimizer=two_groups, epochs=2),
    "adamw-groups": Live(optimizer=two_adamw_groups, epochs=2),
    "scheduler": Live(scheduler=lambda o: CosineAnnealingLR(o, T_max=10), epochs=2),
    "shuffled": Live(shuffle=True, epochs=3, drop_last=False),
    "evaluation": Live(net=dropout_net, evaluate=True, epochs=2),
    "evaluation-shuffled": Live(net=dropout_net, evaluate=True, shuffle=True, epochs=3),
    "clipped": Live(clip=0.3, epochs=2),
    "clipped-groups": Live(optimizer=two_adamw_groups, clip=0.5, epochs=3),
    "tied": Live(net=Tied, epochs=2),
    "everything": Live(
        net=everything_net,
        optimizer=two_adamw_groups,
        scheduler=lambda o: CosineAnnealingLR(o, T_max=20),
        shuffle=True,
        epochs=3,
        evaluate=True,
        clip=0.5,
    ),
}


def other_weights(net: Callable[[], nn.Module]) -> nn.Module:
    model = seeded(99, net)()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.add_(3.0)
    return model


@pytest.mark.parametrize("name", LIVE)
def test_replay_without_nothing_is_the_run(name: str, tmp_path: Path) -> None:
    live = LIVE[name]
    model = live.train(tmp_path / "run")
    run = culpa.open_run(tmp_path / "run")
    problem = culpa.Problem(other_weights(live.net), cross_entropy)
    torch.manual_seed(12345)  # whatever the process did since
    found = culpa.replay(run, problem)
    assert_bitwise(found.state, parameters_of(model))
    assert_bitwise(run.final_state(), parameters_of(model))
    if buffers_of(model):
        assert_bitwise(found.buffers, buffers_of(model))
        assert_bitwise(run.final_buffers(), buffers_of(model))
    else:
        assert not found.buffers


def rows_of_a_larger_tensor() -> tuple[Callable[[], nn.Module], list[Any]]:
    inputs, targets = data(0, rows=60).tensors
    return plain_net, [(inputs[i : i + 3], targets[i : i + 3]) for i in range(0, 60, 3)]


def transposed_rows() -> tuple[Callable[[], nn.Module], list[Any]]:
    inputs, targets = data(0, rows=60).tensors
    columns = inputs.t().contiguous().t()
    return plain_net, [(columns[i : i + 5], targets[i : i + 5]) for i in range(0, 60, 5)]


def images_with_channels_last() -> tuple[Callable[[], nn.Module], list[Any]]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, 8, 8, 3, generator=generator).permute(0, 3, 1, 2)
    targets = torch.randint(0, 3, (32,), generator=generator)

    def net() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 3),
        )

    return net, [(images[i : i + 8], targets[i : i + 8]) for i in range(0, 32, 8)]


@pytest.mark.parametrize(
    "make", [rows_of_a_larger_tensor, transposed_rows, images_with_channels_last]
)
def test_batches_that_are_views_replay_bit_for_bit(
    make: Callable[[], tuple[Callable[[], nn.Module], list[Any]]], tmp_path: Path
) -> None:
    # Kernels choose their order of summation by strides and by alignment in memory: a batch that
    # comes back from the record with the same numbers elsewhere can give other bits.
    net, batches = make()
    model = seeded(1, net)()
    optimizer = sgd_(model)
    problem = culpa.Problem(model, cross_entropy)
    with culpa.record(tmp_path / "run", problem, optimizer) as recorder:
        for batch in recorder.batches(batches):
            optimizer.zero_grad()
            cross_entropy(model, batch).backward()
            optimizer.step()
    problem = culpa.Problem(other_weights(net), cross_entropy)
    found = culpa.replay(culpa.open_run(tmp_path / "run"), problem)
    assert_bitwise(found.state, parameters_of(model))


@pytest.mark.parametrize("name", LIVE)
def test_recording_does_not_change_the_training(name: str, tmp_path: Path) -> None:
    live = LIVE[name]
    recorded = live.train(tmp_path / "run")
    after = torch.rand(4)
    free = live.train(None)
    assert_bitwise(parameters_of(recorded), parameters_of(free))
    if buffers_of(free):
        assert_bitwise(buffers_of(recorded), buffers_of(free))
    # Code after the recording sees the random numbers it would have seen without.
    assert torch.equal(after, torch.rand(4))


@pytest.mark.parametrize("name", ["everything", "evaluation-shuffled", "adamw"])
def test_verify_by_replay(name: str, tmp_path: Path) -> None:
    live = LIVE[name]
    live.train(tmp_path / "run")
    run = culpa.open_run(tmp_path / "run")
    problem = culpa.Problem(other_weights(live.net), cross_entropy)
    run.verify(problem, level="digest")
    run.verify(problem, level="replay")


def test_verify_notices_another_loss(tmp_path: Path) -> None:
    LIVE["adamw"].train(tmp_path / "run")
    run = culpa.open_run(tmp_path / "run")

    def smoothed(model: nn.Module, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1)

    problem = culpa.Problem(plain_net(), smoothed)
    with pytest.raises(culpa.IntegrityError, match=r"update 0"):
        run.verify(problem, level="replay")


def test_dropout_counterfactual_draws_what_was_recorded(tmp_path: Path) -> None:
    # The masks of each update are those of the observed run, whichever updates are executed: by
    # hand, from the generator states of a plain loop.
    live = Live(net=dropout_net, optimizer=sgd_)
    live.train(tmp_path / "run")
    run = culpa.open_run(tmp_path / "run")
    torch.manual_seed(11)
    model = dropout_net()
    start = parameters_of(model)
    optimizer = sgd_(model)
    batches, generators = [], []
    for number in range(2):
        for batch in DataLoader(data(number), batch_size=5, drop_last=True):
            batches.append(batch)
            generators.append(torch.get_rng_state())
            optimizer.zero_grad()
            cross_entropy(model, batch).backward()
            optimizer.step()
    for without in ([2], [0, 1], [3, 4, 5]):
        again = dropout_net()
        again.load_state_dict(start)
        optimizer = sgd_(again)
        for k, (batch, generator) in enumerate(zip(batches, generators, strict=True)):
            if k not in without:
                torch.set_rng_state(generator)
                optimizer.zero_grad()
                cross_entropy(again, batch).backward()
                optimizer.step()
        problem = culpa.Problem(other_weights(dropout_net), cross_entropy)
        assert_bitwise(culpa.replay(run, problem, without=without).state, parameters_of(again))


# ----------------------------------------------------------------------------------------------
# Plans: something removed


def net_plan(
    net: Callable[[], nn.Module],
    optimizers: dict[int, Callable[[nn.Module], Optimizer]],
    name: str = "",
    clip: float | None = None,
) -> Plan:
    """Twelve updates in three stages on random data, float32."""
    base = smooth(optimizers, rates_for(name))
    return Plan(
        model=seeded(5, net),
        loss=cross_entropy,
        optimizers=optimizers,
        batches=[(inputs.float(), targets) for inputs, targets in base.batches],
        rates=base.rates,
        stages=base.stages,
        example_losses=cross_entropies,
        clip_grad_norm=clip,
    )


PLANS: dict[str, Plan] = {
    "sgd": net_plan(plain_net, {0: sgd(momentum=0.9, weight_decay=0.1)}),
    "dampened": net_plan(plain_net, {0: sgd(momentum=0.9, dampening=0.5)}),
    "nesterov": net_plan(plain_net, {0: sgd(momentum=0.9, nesterov=True)}),
    "adamw": net_plan(plain_net, {0: adamw(weight_decay=0.1)}),
    "amsgrad": net_plan(plain_net, {0: adam(amsgrad=True)}),
    "groups": net_plan(plain_net, {0: two_groups}, "two-groups"),
    "adamw-groups": net_plan(plain_net, {0: two_adamw_groups}, "two-adamw-groups"),
    "clipped": net_plan(plain_net, {0: adamw()}, clip=0.2),
    "batchnorm": net_plan(batchnorm_net, {0: sgd(momentum=0.9)}),
    "replaced": net_plan(plain_net, {0: sgd(momentum=0.9), 5: adamw(), 9: sgd(momentum=0.5)}),
    "double": smooth({0: adamw(weight_decay=0.1)}, DECAYING),
    "linear": affine({0: sgd(momentum=0.9)}, DECAYING),
}

REMOVALS: list[tuple[str | list[int], list[int]]] = [
    ("first", list(range(5))),
    ("second", list(range(5, 9))),
    ("third", list(range(9, 12))),
    ([0], [0]),
    ([4], [4]),
    ([11], [11]),
    ([5, 6], [5, 6]),
    ([1, 2, 4, 5, 10], [1, 2, 4, 5, 10]),
    (list(range(12)), list(range(12))),
]


@pytest.mark.parametrize(
    ("name", "counterfactual"),
    [
        (name, counterfactual)
        for name in PLANS
        for counterfactual in ("skip", "restart", "zero-gradient")
        # Whether running statistics move at gradient zero is nobody's contract.
        if (name, counterfactual) != ("batchnorm", "zero-gradient")
    ],
)
def test_replay_without_is_retraining_without(
    name: str, counterfactual: Counterfactual, tmp_path: Path
) -> None:
    plan = PLANS[name]
    recorded = record(plan, tmp_path / "run")
    assert_bitwise(retrain(plan).parameters, recorded.run.final_state())
    for without, updates in REMOVALS:
        expected = retrain(plan, updates, counterfactual)
        found = culpa.replay(
            recorded.run, recorded.problem, without=without, counterfactual=counterfactual
        )
        assert_bitwise(found.state, expected.parameters)
        if expected.buffers:
            assert_bitwise(found.buffers, expected.buffers)


def test_removing_something_changes_something(tmp_path: Path) -> None:
    recorded = record(PLANS["adamw"], tmp_path / "run")
    end = recorded.run.final_state()
    seen = [end["0.weight"]]
    for counterfactual in ("skip", "restart", "zero-gradient"):
        found = culpa.replay(
            recorded.run, recorded.problem, without="second", counterfactual=counterfactual
        )
        assert not any(torch.equal(found.state["0.weight"], other) for other in seen)
        seen.append(found.state["0.weight"])


def test_stage_names_and_update_indices_mean_the_same(tmp_path: Path) -> None:
    recorded = record(PLANS["adamw"], tmp_path / "run")
    by_name, by_index = (
        culpa.replay(recorded.run, recorded.problem, without=w) for w in ("second", range(5, 9))
    )
    assert_bitwise(by_name.state, by_index.state)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_where_the_run_restarted_skip_is_restart(name: str, tmp_path: Path) -> None:
    build = PLANS[name].optimizers[0]
    plan = net_plan(plain_net, {0: build, 5: build, 9: build})
    recorded = record(plan, tmp_path / "run")
    for stage, start, stop in plan.stages:
        skip, restart = (
            culpa.replay(recorded.run, recorded.problem, without=stage, counterfactual=c)
            for c in ("skip", "restart")
        )
        assert_bitwise(skip.state, restart.state)
        assert_bitwise(skip.state, retrain(plan, range(start, stop)).parameters)


def test_a_loop_that_clears_its_optimizer_at_the_boundary(tmp_path: Path) -> None:
    # One optimizer object, forgotten state: the multi-stage pipeline of the paper's E.1.
    build = adamw(weight_decay=0.1)
    plan = net_plan(plain_net, {0: build, 5: build, 9: build})
    model = plan.model()
    optimizer = build(model)
    with culpa.record(tmp_path / "run", culpa.Problem(model, plan.loss), optimizer) as recorder:
        for name, start, stop in plan.stages:
            optimizer.state.clear()
            with recorder.stage(name):
                for k, batch in enumerate(recorder.batches(plan.batches[start:stop]), start):
                    set_groups(plan, k, optimizer)
                    optimizer.zero_grad()
                    plan.loss(model, batch).backward()
                    optimizer.step()
    run = culpa.open_run(tmp_path / "run")
    problem = culpa.Problem(plan.model(), plan.loss)
    assert_bitwise(culpa.replay(run, problem).state, parameters_of(model))
    for stage, start, stop in plan.stages:
        for counterfactual in ("skip", "restart"):
            found = culpa.replay(run, problem, without=stage, counterfactual=counterfactual)
            assert_bitwise(found.state, retrain(plan, range(start, stop)).parameters)


def test_another_number_of_threads_is_set_back(tmp_path: Path) -> None:
    recorded = record(PLANS["adamw"], tmp_path / "run")
    torch.set_num_threads(2)
    try:
        found = culpa.replay(recorded.run, recorded.problem)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert_bitwise(found.state, recorded.run.final_state())


def test_the_true_effect(tmp_path: Path) -> None:
    plan = PLANS["batchnorm"]
    recorded = record(plan, tmp_path / "run")
    inputs, targets = held_out()
    batch = (inputs.float(), targets)
    effect = culpa.replay(recorded.run, recorded.problem, without="second").effect(
        culpa.log_likelihood("right", batch)
    )
    # In evaluation mode, each with its own running statistics.
    truth = behaviour_values(retrain(plan).model, log_likelihoods, batch) - behaviour_values(
        retrain(plan, range(5, 9)).model, log_likelihoods, batch
    )
    assert effect.shape == (len(targets),)
    assert_close(effect, truth, 1e-6)


# ----------------------------------------------------------------------------------------------
# The model is only borrowed


# Not Python's own generator: the annotation checker that tests run under draws from it. See
# test_pythons_generator_is_left_as_it_was.
def photograph(model: nn.Module) -> dict[str, Any]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {
        "values": {n: t.detach().clone() for n, t in named},
        "places": {n: t.data_ptr() for n, t in named},
        "objects": {n: id(t) for n, t in named},
        "versions": [n for n, _ in named],
        "wanted": {n: t.requires_grad for n, t in named},
        "gradients": {
            n: None if p.grad is None else (id(p.grad), p.grad.clone())
            for n, p in model.named_parameters()
        },
        "modes": {n: m.training for n, m in model.named_modules()},
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "grad": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "default": torch.get_default_dtype(),
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert_bitwise(after.pop("values"), before.pop("values"))
    assert torch.equal(after.pop("torch"), before.pop("torch"))
    old, new = before.pop("gradients"), after.pop("gradients")
    assert set(old) == set(new)
    for name, gradient in old.items():
        if gradient is None:
            assert new[name] is None, name
        else:
            assert new[name] is not None, name
            assert new[name][0] == gradient[0], f"the gradient of {name} is another tensor"
            assert torch.equal(new[name][1], gradient[1]), name
    numbers = before.pop("numpy"), after.pop("numpy")
    assert all(np.array_equal(a, b) for a, b in zip(*numbers, strict=True))
    assert after == before


def lived_in(net: Callable[[], nn.Module]) -> nn.Module:
    """A model in the middle of somebody's work."""
    model = other_weights(net)
    model.train()
    list(model.children())[1].eval()
    first, *_ = model.parameters()
    first.grad = torch.full_like(first, 0.5)
    return model


def calls(kind: str) -> list[Callable[[Any, Any, Any], object]]:
    common: list[Callable[[Any, Any, Any], object]] = [
        lambda run, problem, b: culpa.replay(run, problem),
        lambda run, problem, b: culpa.replay(run, problem, without="first").effect(b),
        lambda run, problem, b: culpa.replay(
            run, problem, without=[3], counterfactual="zero-gradient"
        ),
        lambda run, problem, b: run.verify(problem, level="replay"),
    ]
    if kind == "statistics":
        return common
    return [
        *common,
        lambda run, problem, b: culpa.attribute(run, problem, [b]),
        lambda run, problem, b: culpa.attribute(run, problem, [b], examples=True),
        lambda run, problem, b: culpa.embed(run, problem).score(b),
        lambda run, problem, b: culpa.embed(run, problem, form="additive").effect(b),
    ]


@pytest.mark.parametrize("kind", ["statistics", "dropout"])
def test_the_model_is_left_as_it_was(kind: str, tmp_path: Path) -> None:
    net = batchnorm_net if kind == "statistics" else dropout_net
    Live(net=net, evaluate=True).train(tmp_path / "run")
    run = culpa.open_run(tmp_path / "run")
    model = lived_in(net)
    problem = culpa.Problem(model, cross_entropy, example_losses=cross_entropies)
    behaviour = culpa.log_likelihood("right", data(7).tensors)  # type: ignore[arg-type]
    torch.manual_seed(77)
    before = photograph(model)
    for call in calls(kind):
        call(run, problem, behaviour)
        assert_same(dict(before), photograph(model))


UNCHECKED = """
import random, sys
import culpa
from oracles.problems import held_out, log_likelihoods, smooth
from oracles.recipes import DECAYING, adamw
from oracles.recording import record
from pathlib import Path

random.seed(5)
expected = random.getstate()
recorded = record(smooth({0: adamw()}, DECAYING), Path(sys.argv[1]))
assert random.getstate() == expected, "record"
b = culpa.log_likelihood("right", held_out())
run, problem = recorded.run, recorded.problem
culpa.replay(run, problem, without="first").effect(b)
assert random.getstate() == expected, "replay"
culpa.attribute(run, problem, [b])
assert random.getstate() == expected, "attribute"
culpa.embed(run, problem).effect(b)
assert random.getstate() == expected, "embed"
"""


def test_pythons_generator_is_left_as_it_was(tmp_path: Path) -> None:
    tests = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", UNCHECKED, str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_behaviour_that_draws_numbers_leaves_the_generators_as_they_were(
    tmp_path: Path,
) -> None:
    recorded = record(PLANS["adamw"], tmp_path / "run")
    run, problem = recorded.run, recorded.problem
    inputs, targets = held_out()

    def sampled(model: nn.Module, _: Any) -> Tensor:
        noisy = inputs.float() + 0.01 * torch.randn(inputs.shape)
        return log_likelihoods(model, (noisy, targets))

    behaviour = culpa.Behaviour("sampled", sampled, None)
    calls_of: dict[str, Callable[[], object]] = {
        "attribute": lambda: culpa.attribute(run, problem, [behaviour]),
        "score": lambda: culpa.embed(run, problem).score(behaviour),
        "effect": lambda: culpa.embed(run, problem).effect(behaviour),
        "replay": lambda: culpa.replay(run, problem, without="first").effect(behaviour),
    }
    disturbed_by = []
    for name, call in calls_of.items():
        before = torch.get_rng_state()
        call()
        if not torch.equal(before, torch.get_rng_state()):
            disturbed_by.append(name)
    assert disturbed_by == []


def test_the_model_is_left_as_it_was_when_a_behaviour_fails(tmp_path: Path) -> None:
    Live(net=dropout_net).train(tmp_path / "run")
    run = culpa.open_run(tmp_path / "run")
    model = lived_in(dropout_net)
    problem = culpa.Problem(model, cross_entropy)

    def fails(model: nn.Module, batch: Any) -> Tensor:
        torch.rand(2)
        raise ZeroDivisionError

    behaviour = culpa.Behaviour("failing", fails, None)
    torch.manual_seed(77)
    before = photograph(model)
    for call in (
        lambda: culpa.replay(run, problem, without="first").effect(behaviour),
        lambda: culpa.attribute(run, problem, [behaviour]),
        lambda: culpa.embed(run, problem).effect(behaviour),
    ):
        with pytest.raises(ZeroDivisionError):
            call()
        assert_same(dict(before), photograph(model))


# ----------------------------------------------------------------------------------------------
# Loops that the record would misrepresent


Step = Callable[[nn.Module, Optimizer, Any, int], None]


def scaled(model: nn.Module, optimizer: Optimizer, batch: Any, k: int) -> None:
    optimizer.zero_grad()
    (2 * cross_entropy(model, batch)).backward()
    optimizer.step()


def clipped(model: nn.Module, optimizer: Optimizer, batch: Any, k: int) -> None:
    optimizer.zero_grad()
    cross_entropy(model, batch).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()


def penalised(model: nn.Module, optimizer: Optimizer, batch: Any, k: int) -> None:
    optimizer.zero_grad()
    penalty = sum(p.square().sum() for p in model.parameters())
    (cross_entropy(model, batch) + 0.1 * penalty).backward()
    optimizer.step()


def accumulated(model: nn.Module, optimizer: Optimizer, batch: Any, k: int) -> None:
    if k == 0:
        optimizer.zero_grad()  # forgotten later
    cross_entropy(model, batch).backward()
    optimizer.step()


def augmented(model: nn.Module, optimizer: Optimizer, batch: Any, k: int) -> None:
    optimizer.zero_grad()
    cross_entropy(model, (batch[0] + 0.1 * torch.randn(batch[0].shape), batch[1])).backward()
    optimizer.step()


def edited(model: nn.Module, optimizer: Optimizer, batch: Any, k: int) -> None:
    optimizer.zero_grad()
    cross_entropy(model, batch).backward()
    optimizer.step()
    with torch.no_grad():
        next(model.parameters()).mul_(0.5)


def clamped(model: nn.Module, optimizer: Optimizer, batch: Any, k: int) -> None:
    honest(model, optimizer, batch, k)
    for p in model.parameters():
        p.data.clamp_(-0.1, 0.1)


def coasting_stopped(model: nn.Module, optimizer: Optimizer, batch: Any, k: int) -> None:
    honest(model, optimizer, batch, k)
    for state in optimizer.state.values():
        state["momentum_buffer"].zero_()


def disturbed(model: nn.Module, optimizer: Optimizer, batch: Any, k: int) -> None:
    torch.rand(1)  # after the batch was fetched, before the masks are drawn
    optimizer.zero_grad()
    cross_entropy(model, batch).backward()
    optimizer.step()


def honest(model: nn.Module, optimizer: Optimizer, batch: Any, k: int) -> None:
    optimizer.zero_grad()
    cross_entropy(model, batch).backward()
    optimizer.step()


PLAIN_NAMES = r"\b(0|2)\.(weight|bias)\b"
DROPOUT_NAMES = r"\b(0|3)\.(weight|bias)\b"


def walk(
    steps: dict[str, Step], net: Callable[[], nn.Module], path: Path, between: bool = False
) -> None:
    torch.manual_seed(3)
    model = net()
    optimizer = sgd_(model)
    with culpa.record(path, culpa.Problem(model, cross_entropy), optimizer) as recorder:
        k = 0
        for number, (name, step) in enumerate(steps.items()):
            if between and number:
                with torch.no_grad():
                    next(model.parameters()).mul_(0.5)
            with recorder.stage(name):
                for batch in recorder.batches(DataLoader(data(number), batch_size=6)):
                    step(model, optimizer, batch, k)
                    k += 1


@pytest.mark.parametrize(
    ("wrong", "net", "names"),
    [
        (scaled, plain_net, PLAIN_NAMES),
        (clipped, plain_net, PLAIN_NAMES),
        (penalised, plain_net, PLAIN_NAMES),
        (augmented, plain_net, PLAIN_NAMES),
        (disturbed, dropout_net, DROPOUT_NAMES),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("stage", ["first", "second"])
def test_an_unmodelled_loop_is_refused_at_the_first_update_of_its_stage(
    wrong: Step, net: Callable[[], nn.Module], names: str, stage: str, tmp_path: Path
) -> None:
    steps = {"first": wrong} if stage == "first" else {"first": honest, "second": wrong}
    update = 0 if stage == "first" else 4
    done: list[int] = []

    def counting(step: Step) -> Step:
        def call(model: nn.Module, optimizer: Optimizer, batch: Any, k: int) -> None:
            step(model, optimizer, batch, k)
            done.append(k)

        return call

    with pytest.raises((culpa.RecordError, culpa.IntegrityError)) as caught:
        walk({n: counting(s) for n, s in steps.items()}, net, tmp_path / "run")
    message = str(caught.value)
    assert re.search(rf"(?i)(update|step) {update}\b", message), message
    assert re.search(names, message), message
    # At once: no later update was executed (the step itself may or may not have returned).
    assert max(done, default=-1) <= update


@pytest.mark.parametrize("between", [False, True], ids=["within", "between stages"])
def test_weights_edited_between_updates_are_refused(between: bool, tmp_path: Path) -> None:
    steps: dict[str, Step] = {"first": honest, "second": honest} if between else {"first": edited}
    with pytest.raises((culpa.RecordError, culpa.IntegrityError)) as caught:
        walk(steps, plain_net, tmp_path / "run", between)
    message = str(caught.value)
    assert re.search(
        r"(?i)stage 'second'|(update|step) [34]\b" if between else r"update [01]\b", message
    )
    assert re.search(PLAIN_NAMES, message), message


@pytest.mark.parametrize(
    "wrong", [clamped, accumulated, coasting_stopped], ids=lambda step: step.__name__
)
def test_what_only_later_updates_do_is_refused_at_the_latest_by_verify(
    wrong: Step, tmp_path: Path
) -> None:
    # p.data.clamp_() does not count as a change of p: torch's version counter stays. Gradients
    # that pile up are right at the first update.
    def record_and_verify() -> None:
        walk({"first": wrong}, plain_net, tmp_path / "run")
        problem = culpa.Problem(plain_net(), cross_entropy)
        culpa.open_run(tmp_path / "run").verify(problem, level="replay")

    with pytest.raises((culpa.RecordError, culpa.IntegrityError), match=r"(?i)update [01]\b"):
        record_and_verify()


def test_an_honest_loop_is_not_refused(tmp_path: Path) -> None:
    walk({"first": honest, "second": honest}, dropout_net, tmp_path / "run")
    assert culpa.open_run(tmp_path / "run").num_steps == 8


def test_a_refused_update_is_in_no_run(tmp_path: Path) -> None:
    with pytest.raises(culpa.CulpaError):
        walk({"first": honest, "second": scaled}, plain_net, tmp_path / "run")
    # What came before is kept as an interrupted run, which is the truth as far as it goes.
    run = culpa.open_run(tmp_path / "run")
    assert run.num_steps == 4
    assert [(s.name, s.start, s.stop) for s in run.stages] == [("first", 0, 4)]
    problem = culpa.Problem(other_weights(plain_net), cross_entropy)
    assert_bitwise(culpa.replay(run, problem).state, run.final_state())


def test_an_exception_of_the_loop_comes_through(tmp_path: Path) -> None:
    def interrupted(model: nn.Module, optimizer: Optimizer, batch: Any, k: int) -> None:
        honest(model, optimizer, batch, k)
        if k == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        walk({"first": interrupted}, plain_net, tmp_path / "run")
