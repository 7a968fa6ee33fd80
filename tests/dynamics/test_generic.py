"""Any torch.optim class through its own step: values, derivatives, clocks, beginnings, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from culpa import tree
from culpa.dynamics import updates
from culpa.dynamics.updates.probe import why_not
from culpa.errors import UnsupportedError
from culpa.tree import Slots, Tree
from oracles.stepping import (
    F64,
    SHAPES,
    Torch,
    assert_close,
    dot_state,
    follow,
    live,
    observed,
    random_tree,
)

MATRICES = ("weight", "head")
BETAS = {"betas": (0.8, 0.9)}
# By name: what is always set, and what may be chosen.
CHOICES: dict[str, dict[str, tuple[Any, ...]]] = {
    "RMSprop": {
        "alpha": (0.9, 0.5),
        "eps": (1e-8, 1e-2),
        "momentum": (0.0, 0.9),
        "centered": (False, True),
        "weight_decay": (0.0, 0.1),
        "maximize": (False, True),
    },
    "Adagrad": {
        "lr_decay": (0.0, 0.1),
        "initial_accumulator_value": (0.0, 0.3),
        "eps": (1e-10, 1e-2),
        "weight_decay": (0.0, 0.1),
        "maximize": (False, True),
    },
    "NAdam": {
        "betas": ((0.9, 0.999), (0.6, 0.8)),
        "momentum_decay": (0.004, 0.1),
        "weight_decay": (0.0, 0.1),
        "decoupled_weight_decay": (False, True),
        "maximize": (False, True),
    },
    "RAdam": {
        "betas": ((0.9, 0.999), (0.6, 0.8)),
        "weight_decay": (0.0, 0.1),
        "decoupled_weight_decay": (False, True),
        "maximize": (False, True),
    },
    "Adamax": {
        "betas": ((0.9, 0.999), (0.6, 0.8)),
        "eps": (1e-8, 1e-2),
        "weight_decay": (0.0, 0.1),
        "maximize": (False, True),
    },
    "Adadelta": {
        "rho": (0.9, 0.5),
        "eps": (1e-6, 1e-2),
        "weight_decay": (0.0, 0.1),
        "maximize": (False, True),
    },
    "ASGD": {
        "lambd": (1e-4, 0.1),
        "alpha": (0.75, 0.5),
        "t0": (1e6, 2.0),
        "weight_decay": (0.0, 0.1),
        "maximize": (False, True),
    },
    "Adafactor": {
        "beta2_decay": (-0.8, -0.3),
        "d": (1.0, 2.0),
        "weight_decay": (0.0, 0.1),
        "maximize": (False, True),
    },
    "Muon": {
        "momentum": (0.95, 0.5),
        "nesterov": (False, True),
        "weight_decay": (0.0, 0.1),
        "adjust_lr_fn": (None, "match_rms_adamw"),
    },
}
CLOCKS = ("step", "mu_product", "eta", "mu")
# foreach ASGD rounds its float32 rate otherwise than the loop does.
WITHOUT_FOREACH = ("Muon", "ASGD")


def some_options(name: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({k: st.sampled_from(v) for k, v in CHOICES[name].items()})


def start(name: str, seed: int) -> Tree:
    params = random_tree(torch.Generator().manual_seed(seed))
    return {n: params[n] for n in MATRICES} if name == "Muon" else params


def walked(name: str, keywords: dict[str, Any], seed: int, count: int) -> Any:
    """As ``observed``, with gradients alive everywhere and matrices only where that is needed."""
    generator = torch.Generator().manual_seed(seed)
    params = start(name, seed)
    shapes = {n: tuple(v.shape) for n, v in params.items()}
    run = Torch(name, params, keywords)
    for _ in range(count):
        run.step(random_tree(generator, F64, **shapes))
    return run, random_tree(generator, F64, **shapes), generator


def torch_step(run: Torch, params: Tree, slots: Slots, grads: Tree) -> tuple[Tree, Slots]:
    """One update of a torch optimizer of its own from the state given: the oracle."""
    name = type(run.optimizer).__name__
    fresh = Torch(name, params, {})
    fresh.optimizer.load_state_dict(run.optimizer.state_dict())
    for n, leaf in fresh.leaves.items():
        for slot, values in slots.items():
            if n in values:
                fresh.optimizer.state[leaf][slot] = values[n].clone()
    fresh.step(grads)
    return fresh.params(), fresh.slots()


@pytest.mark.parametrize("name", CHOICES)
@given(data=st.data())
@settings(max_examples=6)
def test_apply_is_torch_optim(name: str, data: st.DataObject) -> None:
    """Two groups, five rates, dead coordinates; against the implementation that torch chooses."""
    keywords = data.draw(some_options(name))
    if name not in WITHOUT_FOREACH:
        keywords["foreach"] = data.draw(st.sampled_from([None, False, True]))
    if name == "Muon":
        keywords["lr"] = 0.02
        oracle = Torch(name, start(name, 1), keywords)
        for k in range(3):
            grads = random_tree(torch.Generator().manual_seed(k), F64, weight=(4, 3), head=(2, 4))
            rules, before = updates.Rules(), (oracle.params(), oracle.slots())
            moved, slots = updates.apply(rules, oracle.groups(), *before, grads)
            oracle.step(grads)
            assert_close(tree.add(before[0], moved), oracle.params())
            assert_close(slots["momentum_buffer"], oracle.slots()["momentum_buffer"])
    else:
        follow(Torch(name, start(name, 1), keywords), name, seed=2)


@pytest.mark.parametrize("name", [n for n in CHOICES if n != "Muon"])
@pytest.mark.parametrize("count", [0, 1, 4])
@given(data=st.data())
@settings(max_examples=2)
def test_pushforward_is_the_difference_of_torchs_own_steps(
    name: str, count: int, data: st.DataObject
) -> None:
    """Float64, central, along a random direction of parameters, slots and gradients."""
    run, grads, generator = walked(name, data.draw(some_options(name)), 3, count)
    params, slots = run.params(), run.slots()
    rules, groups = updates.Rules(), run.groups()
    theta, tangent = tree.clone(grads), random_tree(generator)
    state = {
        s: {n: v * torch.randn(v.shape, generator=generator, dtype=F64) for n, v in t.items()}
        for s, t in slots.items()
        if any(v.ndim for v in t.values()) and s not in CLOCKS
    }

    def at(h: float) -> tuple[Tree, Slots]:
        moved = {s: tree.add(v, tree.scale(h, state.get(s, {}))) for s, v in slots.items()}
        here, there = (
            tree.add(params, tree.scale(h, theta)),
            tree.add(grads, tree.scale(h, tangent)),
        )
        return torch_step(run, here, moved, there)

    pushed, after = updates.pushforward(rules, groups, params, slots, grads, theta, state, tangent)
    h = 1e-6
    (p, q), (m, n) = at(h), at(-h)
    assert_close(pushed, tree.scale(0.5 / h, tree.subtract(p, m)), rtol=1e-5, atol=1e-6)
    for slot in state:
        expected = tree.scale(0.5 / h, tree.subtract(q[slot], n[slot]))
        assert_close(after[slot], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("count", [0, 1, 4])
@pytest.mark.parametrize("single", [False, True])
def test_pullback_is_the_transpose_of_pushforward(name: str, count: int, single: bool) -> None:
    """Clocks and dead coordinates included."""
    run, grads, generator = walked(name, {"weight_decay": 0.1}, 5, count)
    dtype = torch.float32 if single else F64
    params, slots = run.params(), run.slots()
    grads["weight"][0] = 0
    params, grads = ({n: v.to(dtype) for n, v in t.items()} for t in (params, grads))
    slots = {
        s: {n: v if s in CLOCKS else v.to(dtype) for n, v in t.items()} for s, t in slots.items()
    }
    rules, groups = updates.Rules(), run.groups()
    ends = updates.apply(rules, groups, params, slots, grads)[1]

    def direction(spaces: Slots) -> tuple[Tree, Slots]:
        def normal(like: torch.Tensor) -> torch.Tensor:
            return torch.randn(like.shape, dtype=dtype, generator=generator)

        return tree.map_values(normal, params), {
            s: tree.map_values(normal, t) for s, t in spaces.items()
        }

    tangent, cotangent = direction(slots), direction(ends)
    moving = direction({})[0]
    pushed = updates.pushforward(rules, groups, params, slots, grads, *tangent, moving)
    [(p, q, w)] = updates.pullback(
        rules, groups, params, slots, grads, [cotangent[0]], [cotangent[1]]
    )
    left = dot_state(cotangent, pushed)
    right = dot_state((p, q), tangent) + tree.dot(w, moving)
    size = dot_state(cotangent, cotangent) ** 0.5 * dot_state(pushed, pushed) ** 0.5
    assert size > 0
    assert abs(left - right) <= (1e-4 if single else 1e-11) * size


@pytest.mark.parametrize("name", [n for n in CHOICES if n != "Muon"])
def test_the_column_of_the_step_counter_is_the_backward_difference(name: str) -> None:
    run, grads, _ = walked(name, {}, 7, 4)
    params, slots, groups = run.params(), run.slots(), run.groups()
    earlier = {**slots, "step": {n: v - 1 for n, v in slots["step"].items()}}
    now, _ = torch_step(run, params, slots, grads)
    then, _ = torch_step(run, params, earlier, grads)
    one = {"step": {n: torch.ones(()) for n in params}}
    pushed, after = updates.pushforward(updates.Rules(), groups, params, slots, grads, {}, one, {})
    assert_close(pushed, tree.subtract(now, then), rtol=1e-6, atol=1e-12)
    assert all(float(v) == 1 for v in after["step"].values())


@pytest.mark.parametrize(
    ("name", "slot", "first"),
    [
        ("Adagrad", "sum", 0.3),
        ("NAdam", "mu_product", 1.0),
        ("ASGD", "mu", 1.0),
        ("ASGD", "eta", 0.05),
        ("RMSprop", "square_avg", 0.0),
        ("RAdam", "step", 0.0),
    ],
)
def test_a_state_that_does_not_exist_yet_is_what_the_class_begins_with(
    name: str, slot: str, first: float
) -> None:
    keywords = {"initial_accumulator_value": 0.3} if name == "Adagrad" else {}
    run, grads, _ = walked(name, keywords, 8, 0)
    assert run.slots() == {} or name == "Adagrad"
    extended = updates.extend(updates.Rules(), run.groups(), run.params(), {}, grads)
    assert set(extended[slot]) == set(SHAPES)
    torch.testing.assert_close(
        extended[slot]["weight"].double(), torch.full_like(extended[slot]["weight"].double(), first)
    )


@pytest.mark.parametrize("name", ["RMSprop", "Adagrad", "NAdam", "RAdam"])
@pytest.mark.parametrize("count", [0, 6])
def test_roots_at_zero_have_a_derivative_of_zero_and_are_counted(name: str, count: int) -> None:
    rules, groups, params, slots, grads = observed(
        name, {"weight_decay": 0.0, **BETAS} if name in ("NAdam", "RAdam") else {}, count=count
    )
    _, after = updates.apply(rules, groups, params, slots, grads)
    dead = SHAPES["weight"][0] + 1
    counted = updates.singular(rules, groups, params, slots, grads, after)
    # RAdam takes no root in its first updates.
    assert counted == (0 if name == "RAdam" and count == 0 else dead)
    cotangent = tree.map_values(torch.ones_like, params)
    [(p, q, w)] = updates.pullback(rules, groups, params, slots, grads, [cotangent], [{}])
    pushed, _ = updates.pushforward(rules, groups, params, slots, grads, cotangent, {}, grads)
    for values in (p, w, pushed, *q.values()):
        assert tree.is_finite(values)
    # The identity is there, whatever becomes of the moments.
    assert bool((p["weight"] == 1).all())
    mask = live(params)
    assert tree.norm({n: w[n] * mask[n] for n in w}) > 0


def test_muon_is_linearised_without_its_rounding() -> None:
    """The derivative is that of a Newton-Schulz iteration in float64, written out here."""
    run, grads, generator = walked("Muon", {"lr": 0.02}, 9, 2)
    params, slots, groups = run.params(), run.slots(), run.groups()
    tangent = {n: torch.randn(v.shape, generator=generator, dtype=F64) for n, v in grads.items()}

    def exact(h: float) -> Tree:
        after: Tree = {}
        for group in groups:
            a, b, c = group.hyper["ns_coefficients"]
            for n in group.names:
                grad = grads[n] + h * tangent[n]
                mu = group.hyper["momentum"]
                buffer = mu * slots["momentum_buffer"][n] + (1 - mu) * grad
                x = (1 - mu) * grad + mu * buffer
                tall = x.shape[0] > x.shape[1]
                x = (x.T if tall else x) / x.norm()
                for _ in range(group.hyper["ns_steps"]):
                    gram = x @ x.T
                    x = a * x + (b * gram + c * gram @ gram) @ x
                rate = group.hyper["lr"] * max(1, params[n].shape[0] / params[n].shape[1]) ** 0.5
                kept = 1 - group.hyper["lr"] * group.hyper["weight_decay"]
                after[n] = kept * params[n] - rate * (x.T if tall else x)
        return after

    pushed, _ = updates.pushforward(updates.Rules(), groups, params, slots, grads, {}, {}, tangent)
    h = 1e-6
    expected = tree.scale(0.5 / h, tree.subtract(exact(h), exact(-h)))
    assert_close(pushed, expected, rtol=1e-6, atol=1e-9)
    # And the step itself is the class's own, in bfloat16: near, not equal.
    moved, _ = updates.apply(updates.Rules(), groups, params, slots, grads)
    gap = tree.norm(tree.subtract(tree.add(params, moved), exact(0.0))) / tree.norm(moved)
    assert 1e-4 < gap < 0.05


@pytest.mark.parametrize("name", [*CHOICES, "SGD", "Adam", "AdamW"])
def test_smooth_steps_are_recognised(name: str) -> None:
    hyper = Torch(name, start(name, 1), {}).groups()[0].hyper
    assert why_not(getattr(torch.optim, name), hyper) == ""


def test_rprop_is_refused_by_name_with_what_works() -> None:
    groups = Torch("Rprop", start("Rprop", 1), {}).groups()
    with pytest.raises(UnsupportedError, match=r"Rprop.*signs.*replay.*Secant"):
        updates.Rules().require_differentiable(groups)


def test_every_class_of_torch_is_accounted_for() -> None:
    found = {
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    }
    refused = {"Optimizer", "LBFGS", "SparseAdam", "Rprop"}
    assert found - {*CHOICES, "SGD", "Adam", "AdamW"} == refused
