"""The model grows between jobs: a new head, adapters around the layers, adapters merged.

The truth is the same script under ``Skipping``: one process that never stops, updates undone.
"""

from __future__ import annotations

from collections.abc import Collection, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import culpa
from oracles.loops import Loop, Open, assert_modelled, assert_replayed
from oracles.problems import (
    cross_entropy,
    held_out,
    log_likelihoods,
    seeded,
    smooth,
)
from oracles.recipes import DECAYING, sgd
from oracles.skipping import Skipping

BATCHES = smooth({0: sgd()}, DECAYING).batches


class Net(nn.Module):
    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.LayerNorm(7), nn.Dropout(0.1))
        self.head = nn.Sequential(nn.Linear(7, width), nn.Tanh(), nn.Linear(width, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.trunk(inputs))


class Adapted(nn.Module):
    """As adapters wrap a layer: it moves to ``base``, under another name."""

    scale = 2.0

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base, self.on = base, True
        self.down = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features)
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))
        self.drop = nn.Dropout(0.2)

    def delta(self) -> Tensor:
        return self.scale * (self.up @ self.down)

    def forward(self, inputs: Tensor) -> Tensor:
        found = self.base(inputs)
        if self.on:
            found = found + self.scale * (self.drop(inputs) @ self.down.T @ self.up.T)
        return found


def adapted(net: nn.Module) -> list[Adapted]:
    return [m for m in net.modules() if isinstance(m, Adapted)]


@contextmanager
def without_adapters(net: nn.Module) -> Generator[None]:
    for layer in adapted(net):
        layer.on = False
    try:
        yield
    finally:
        for layer in adapted(net):
            layer.on = True


def plainly(grown: Any, batch: Any) -> Tensor:
    """The cross-entropy without the adapters, if there are any."""
    with without_adapters(grown.module):
        return cross_entropy(grown.module, batch)


def tuned(grown: Any, batch: Any) -> Tensor:
    return cross_entropy(grown.tuned, batch)


def with_adapters(grown: Any, batch: Any) -> Tensor:
    return cross_entropy(grown.module, batch)


def merging(grown: Any, batch: Any) -> Tensor:
    """Whose gradient by each base is minus what its adapter adds."""
    parts = [(layer.base.weight * layer.delta()).sum() for layer in adapted(grown.module)]
    return -torch.stack(parts).sum()


class ByHand(Optimizer):
    """The truth of a merge: the weights are edited."""

    def __init__(self, layers: list[Adapted]) -> None:
        super().__init__([layer.base.weight for layer in layers], {})
        self.layers = layers

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for layer in self.layers:
            layer.base.weight += layer.delta()


def pretrain(grown: Any, by_hand: bool) -> Optimizer:
    return SGD(grown.module.parameters(), lr=0.01, momentum=0.9)


def new_head(grown: Any, by_hand: bool) -> Optimizer:
    grown.tuned = seeded(3, lambda: Net(4).double())()
    grown.tuned.trunk = grown.module.trunk
    return SGD(grown.tuned.parameters(), lr=0.01, momentum=0.9)


def adapters(grown: Any, by_hand: bool) -> Optimizer:
    net = grown.module.requires_grad_(False)
    torch.manual_seed(5)
    for parent, key in ((net.trunk, "0"), (net.head, "0"), (net.head, "2")):
        setattr(parent, key, Adapted(getattr(parent, key)).double())
    return SGD([p for p in net.parameters() if p.requires_grad], lr=0.02, momentum=0.9)


def merge(grown: Any, by_hand: bool) -> Optimizer:
    layers = adapted(grown.module)
    bases = [layer.base.weight.requires_grad_() for layer in layers]
    return ByHand(layers) if by_hand else SGD(bases, lr=1.0)


def onward(grown: Any, by_hand: bool) -> Optimizer:
    named = grown.module.named_parameters()
    bases = [p.requires_grad_() for n, p in named if ".up" not in n and ".down" not in n]
    return SGD(bases, lr=0.01)


CASES: dict[str, dict[str, tuple[Any, Any, int, int]]] = {
    "a new head": {
        "pretrain": (pretrain, plainly, 0, 4),
        "tune": (new_head, tuned, 4, 8),
    },
    "adapters": {
        "pretrain": (pretrain, plainly, 0, 4),
        "adapt": (adapters, with_adapters, 4, 8),
    },
    "merged adapters": {
        "pretrain": (pretrain, plainly, 0, 3),
        "adapt": (adapters, with_adapters, 3, 6),
        "merge": (merge, merging, 6, 7),
        "go on": (onward, plainly, 7, 9),
    },
}
"""By stage how it begins, its loss, and its batches."""


class Growing(Loop):
    """One job after another; the model grows between them."""

    def retrain(self, without: Collection[int] = ()) -> nn.Module:
        model, drivers = self.model(), list[Skipping]()

        @contextmanager
        def opened(problem: Any, optimizer: Any) -> Generator[Skipping]:
            if drivers:
                drivers[0]._watch([optimizer])
            else:
                drivers.append(Skipping(model, [optimizer], frozenset(without)))
            yield drivers[0]

        torch.manual_seed(self.seed)
        self.train(model, opened)
        return model

    def record(self, path: Path) -> tuple[Any, nn.Module]:
        model, made = self.model(), list[Path]()

        def opened(problem: Any, optimizer: Any) -> Any:
            known = culpa.open_run(made[-1]).manifest.parameters if made else {}
            grows = bool(made) and known.keys() != dict(model.named_parameters()).keys()
            if grows or not made:
                made.append(path / str(len(made)))
            if grows:
                culpa.grow(culpa.open_run(made[-2]), made[-1], model)
            return culpa.record(made[-1], problem, optimizer, append=True)

        torch.manual_seed(self.seed)
        self.train(model, opened)
        return culpa.open_run(made[-1]), model

    def scrambled(self) -> Any:
        model = self.retrain()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-1.5).add_(0.25)
        return self.problem(model)


def growing(case: str) -> Growing:
    stages = CASES[case]

    def train(model: nn.Module, opened: Open) -> None:
        by_hand = "retrain" in opened.__qualname__
        for number, (name, (begin, loss, start, stop)) in enumerate(stages.items()):
            optimizer = begin(model, by_hand)
            torch.manual_seed(number)
            with opened(culpa.Problem(model, loss), optimizer) as driver, driver.stage(name):
                for batch in driver.batches(BATCHES[start:stop]):
                    optimizer.zero_grad()
                    loss(model, batch).backward()
                    optimizer.step()

    def problem(model: nn.Module) -> Any:
        named = {name: culpa.Problem(model, loss) for name, (_, loss, _, _) in stages.items()}
        return culpa.Problem.by_stage(named)

    def behaviour(grown: Any, batch: Any) -> Tensor:
        last = list(stages.values())[-1][1]
        if last is not plainly:
            return log_likelihoods(grown, batch)  # of the module assigned last
        with without_adapters(grown.module):
            return log_likelihoods(grown, batch)

    return Growing(grown_net, train, problem, behaviour, held_out())


def grown_net() -> nn.Module:
    return culpa.Grown(seeded(0, lambda: Net().double())())


@pytest.mark.parametrize("case", list(CASES))
def test_the_model_grows(case: str, tmp_path: Path) -> None:
    loop = growing(case)
    run, problem = assert_replayed(loop, tmp_path / "run")
    assert_modelled(loop, run, problem)


def test_without_an_earlier_stage_the_new_head_is_the_same(tmp_path: Path) -> None:
    loop = growing("a new head")
    run, _ = loop.record(tmp_path / "run")
    born = seeded(3, lambda: Net(4).double())().head
    start = run.initial_state().params
    for name, value in born.named_parameters():
        assert torch.equal(start[f"tuned.head.{name}"], value)
        assert run.tables.joined[f"tuned.head.{name}"] == 4
