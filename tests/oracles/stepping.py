"""One parameter update at a time: torch.optim beside the library's update maps."""

from __future__ import annotations

from typing import Any

import torch

from culpa import tree
from culpa.dynamics import updates
from culpa.trajectory.schema import Group
from culpa.tree import Slots, Tree

F64 = torch.float64
SHAPES: dict[str, tuple[int, ...]] = {"weight": (4, 3), "bias": (4,), "head": (2, 4), "gain": ()}
GROUPS = (("weight", "bias"), ("head", "gain"))
RATES = (1.0, 0.3)  # of the two groups, times the schedule
SCHEDULE = (0.05, 0.04, 0.06, 0.0, 0.03)


def random_tree(generator: torch.Generator, dtype: torch.dtype = F64, **shapes: Any) -> Tree:
    return {
        name: torch.randn(shape, dtype=dtype, generator=generator)
        for name, shape in (shapes or SHAPES).items()
    }


def gradients(generator: torch.Generator, index: int) -> Tree:
    """Random, dead in the first column and the first bias, without "head" in updates 0 and 2."""
    grads = random_tree(generator)
    grads["weight"][:, 0] = 0
    grads["bias"][0] = 0
    if index in (0, 2):
        del grads["head"]
    return grads


class Torch:
    """The same parameters under the optimizer of torch: the oracle."""

    def __init__(self, name: str, params: Tree, keywords: dict[str, Any]) -> None:
        self.leaves = {n: torch.nn.Parameter(value.clone()) for n, value in params.items()}
        groups = [
            {"params": [self.leaves[n] for n in names if n in params], "lr": rate * SCHEDULE[0]}
            for names, rate in zip(GROUPS, RATES, strict=True)
        ]
        self.optimizer = getattr(torch.optim, name)(groups, **keywords)

    def groups(self) -> list[Group]:
        names = {id(leaf): name for name, leaf in self.leaves.items()}
        return [
            Group(
                names=tuple(names[id(leaf)] for leaf in group["params"]),
                hyper={key: value for key, value in group.items() if key != "params"},
                optimizer=type(self.optimizer).__name__,
            )
            for group in self.optimizer.param_groups
        ]

    def set_rate(self, rate: float) -> None:
        for group, factor in zip(self.optimizer.param_groups, RATES, strict=True):
            group["lr"] = rate * factor

    def step(self, grads: Tree) -> None:
        for name, leaf in self.leaves.items():
            leaf.grad = grads[name].clone() if name in grads else None
        self.optimizer.step()

    def params(self) -> Tree:
        return tree.clone(self.leaves)

    def slots(self) -> Slots:
        slots: Slots = {}
        for name, leaf in self.leaves.items():
            for slot, value in self.optimizer.state.get(leaf, {}).items():
                slots.setdefault(slot, {})[name] = value.detach().clone()
        return slots


def observed(
    name: str, keywords: dict[str, Any], seed: int = 0, count: int = 3
) -> tuple[updates.Rules, list[Group], Tree, Slots, Tree]:
    """(rule, groups, params, slots, grads) of the update after ``count`` updates of torch."""
    generator = torch.Generator().manual_seed(seed)
    run = Torch(name, random_tree(generator), keywords)
    for index in range(count):
        run.step(gradients(generator, index))
    grads = gradients(generator, count)
    return updates.Rules(), run.groups(), run.params(), run.slots(), grads


def live(params: Tree) -> Tree:
    """1 where gradients are not identically zero."""
    mask = {name: torch.ones_like(value) for name, value in params.items()}
    mask["weight"][:, 0] = 0
    mask["bias"][0] = 0
    return mask


def random_state(
    generator: torch.Generator, slots: Slots, discrete: bool = True
) -> tuple[Tree, Slots]:
    """A random direction of (theta, slots), the discrete coordinates included."""
    shapes = {slot: {n: v.shape for n, v in values.items()} for slot, values in slots.items()}
    if "momentum_buffer" in slots:
        shapes["started"] = {name: torch.Size() for name in slots["momentum_buffer"]}
    if not discrete:
        shapes = {s: values for s, values in shapes.items() if s not in ("step", "started")}
    return random_tree(generator), {
        slot: random_tree(generator, **values) for slot, values in shapes.items()
    }


def dot_state(a: tuple[Tree, Slots], b: tuple[Tree, Slots]) -> float:
    slots = sum(tree.dot(a[1][slot], b[1][slot]) for slot in a[1] if slot in b[1])
    return tree.dot(a[0], b[0]) + slots


def assert_close(actual: Tree, expected: Tree, rtol: float = 1e-12, atol: float = 1e-12) -> None:
    """Same names, same values."""
    assert set(actual) == set(expected)
    for name in expected:
        torch.testing.assert_close(
            actual[name],
            expected[name],
            rtol=rtol,
            atol=atol,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def follow(oracle: Torch, name: str, seed: int, complete: bool = False) -> None:
    """Walk five updates beside torch, from our own states, and compare everything every time."""
    generator = torch.Generator().manual_seed(seed)
    rule = updates.Rules()
    params, slots = oracle.params(), oracle.slots()
    for index, rate in enumerate(SCHEDULE):
        oracle.set_rate(rate)
        grads = gradients(generator, 1 if complete else index)
        increments, slots = updates.apply(rule, oracle.groups(), params, slots, grads)
        assert set(increments) == set(grads)
        params = tree.add(params, increments)
        oracle.step(grads)
        assert_close(params, oracle.params())
        expected = oracle.slots()
        assert set(slots) == set(expected)
        for slot in expected:
            assert_close(slots[slot], expected[slot])
