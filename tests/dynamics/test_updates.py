"""Update rules against torch.optim, finite differences, autograd and each other."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from culpa import tree
from culpa.dynamics import updates
from culpa.errors import OptionError, UnsupportedError
from culpa.trajectory.schema import Group
from culpa.tree import Slots, Tree
from oracles.stepping import (
    F64,
    RATES,
    SHAPES,
    Torch,
    assert_close,
    dot_state,
    follow,
    live,
    observed,
    random_state,
    random_tree,
)


def product(name: str, **options: tuple[Any, ...]) -> list[Any]:
    combinations = [
        dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())
    ]
    return [
        pytest.param(name, keywords, id=name + "-" + "-".join(str(v) for v in keywords.values()))
        for keywords in combinations
        if not keywords.get("nesterov") or (keywords["momentum"] > 0 and keywords["dampening"] == 0)
    ]


ADAM_OPTIONS: dict[str, tuple[Any, ...]] = {
    "betas": ((0.9, 0.999), (0.6, 0.8)),
    "eps": (1e-8, 1e-2),
    "weight_decay": (0.0, 0.1),
    "amsgrad": (False, True),
    "maximize": (False, True),
}
GRID = [
    *product(
        "SGD",
        momentum=(0.0, 0.9),
        dampening=(0.0, 0.3),
        nesterov=(False, True),
        weight_decay=(0.0, 0.1),
        maximize=(False, True),
    ),
    *product("Adam", **ADAM_OPTIONS),
    *product("AdamW", **ADAM_OPTIONS),
    *product("Adam", weight_decay=(0.1,), decoupled_weight_decay=(True,)),
]
# The first torch.func.jvp of a process loads decompositions that torch 2.13 itself still scripts.
uses_jvp = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
over_the_grid = pytest.mark.parametrize(("name", "keywords"), GRID)


@over_the_grid
def test_apply_is_torch_optim(name: str, keywords: dict[str, Any]) -> None:
    params = random_tree(torch.Generator().manual_seed(1))
    follow(Torch(name, params, keywords), name, seed=2)


@pytest.mark.parametrize("implementation", ["foreach", "fused"])
@pytest.mark.parametrize(
    ("name", "keywords"),
    [
        ("SGD", {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
        ("Adam", {"amsgrad": True, "weight_decay": 0.1}),
        ("AdamW", {"weight_decay": 0.1}),
    ],
)
def test_implementations_of_torch_are_one_map(
    name: str, keywords: dict[str, Any], implementation: str
) -> None:
    # All gradients present: fused SGD of torch 2.13 fails where only some buffers exist.
    params = random_tree(torch.Generator().manual_seed(1))
    follow(Torch(name, params, {**keywords, implementation: True}), name, 2, complete=True)


def test_rates_and_betas_may_be_tensors() -> None:
    rule, groups, params, slots, grads = observed("Adam", {})
    increments, _ = updates.apply(rule, groups, params, slots, grads)
    tensors = [
        Group(
            names=group.names,
            hyper={
                **group.hyper,
                "lr": torch.tensor(group.hyper["lr"], dtype=F64),
                "betas": tuple(torch.tensor(beta, dtype=F64) for beta in group.hyper["betas"]),
            },
            optimizer="Adam",
        )
        for group in groups
    ]
    assert_close(updates.apply(rule, tensors, params, slots, grads)[0], increments)


@over_the_grid
def test_pushforward_is_the_finite_difference(name: str, keywords: dict[str, Any]) -> None:
    rule, groups, params, slots, grads = observed(name, keywords, seed=3)
    generator = torch.Generator().manual_seed(4)
    mask = live(params)
    theta, state = random_state(generator, slots, discrete=False)
    # At second moment 0 the map has no derivative: directions stay among the live coordinates.
    theta = {n: value * mask[n] for n, value in theta.items()}
    # And second moments move by a fraction of themselves: they must stay positive.
    state = {
        s: {n: v * (slots[s][n] if "sq" in s else mask[n]) for n, v in values.items()}
        for s, values in state.items()
    }
    tangent = {n: value * mask[n] for n, value in random_tree(generator).items() if n in grads}

    def at(h: float) -> tuple[Tree, Slots]:
        moved = {s: tree.add(v, tree.scale(h, state.get(s, {}))) for s, v in slots.items()}
        here = tree.add(params, tree.scale(h, theta))
        there = tree.add(grads, tree.scale(h, tangent))
        increments, after = updates.apply(rule, groups, here, moved, there)
        return tree.add(here, increments), after

    pushed, pushed_slots = updates.pushforward(
        rule, groups, params, slots, grads, theta, state, tangent
    )
    h = 1e-4
    (p1, q1), (m1, n1), (p2, q2), (m2, n2) = at(h), at(-h), at(2 * h), at(-2 * h)

    def difference(p1: Tree, m1: Tree, p2: Tree, m2: Tree) -> Tree:
        """Central, of fourth order."""
        inner, outer = tree.subtract(p1, m1), tree.subtract(p2, m2)
        return tree.add(tree.scale(2 / (3 * h), inner), tree.scale(-1 / (12 * h), outer))

    assert_close(pushed, difference(p1, m1, p2, m2), rtol=1e-8, atol=1e-9)
    for slot in state:
        expected = difference(q1[slot], n1[slot], q2[slot], n2[slot])
        assert_close(pushed_slots[slot], expected, rtol=1e-8, atol=1e-9)


@over_the_grid
@pytest.mark.parametrize("count", [0, 1, 4])
def test_pullback_is_autograd_through_apply(
    name: str, keywords: dict[str, Any], count: int
) -> None:
    """Dead coordinates and ties of the maximum included; fresh and warm optimizers."""
    rule, groups, params, slots, grads = observed(name, keywords, seed=5, count=count)
    generator = torch.Generator().manual_seed(6)
    discrete = {"step", "started"}

    def leaves(values: Tree) -> Tree:
        return {n: value.clone().requires_grad_() for n, value in values.items()}

    theta, gradient = leaves(params), leaves(grads)
    state = {s: v if s in discrete else leaves(v) for s, v in slots.items()}
    increments, after = updates.apply(rule, groups, theta, state, gradient)
    outputs = (tree.add(theta, increments), {s: after[s] for s in after if s not in discrete})
    cotangent = random_state(generator, outputs[1], discrete=False)
    total = sum((outputs[0][n] * cotangent[0][n]).sum() for n in outputs[0])
    for slot, values in outputs[1].items():
        total = total + sum((values[n] * cotangent[1][slot][n]).sum() for n in values)
    total.backward()

    [(p, q, w)] = updates.pullback(
        rule, groups, params, slots, grads, [cotangent[0]], [cotangent[1]]
    )
    assert_close(p, {n: leaf.grad for n, leaf in theta.items()})
    assert_close(w, {n: leaf.grad for n, leaf in gradient.items()})
    for slot in set(state) - discrete:
        # Slots that do not exist yet have a cotangent too, but no leaf to compare it with.
        there = {n: value for n, value in q[slot].items() if n in state[slot]}
        assert_close(there, {n: leaf.grad for n, leaf in state[slot].items()})


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=3),
    seed=st.integers(0, 10**6),
    which=st.integers(0, len(GRID) - 1),
    count=st.integers(0, 3),
    single=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_pullback_is_the_transpose_of_pushforward(
    shapes: list[tuple[int, ...]], seed: int, which: int, count: int, single: bool
) -> None:
    name, keywords = GRID[which].values
    dtype = torch.float32 if single else F64
    named = {f"p{i}": shape for i, shape in enumerate(shapes)}
    leaf = torch.nn.Parameter(torch.zeros(1))
    hyper = dict(getattr(torch.optim, name)([leaf], lr=0.1, **keywords).param_groups[0])
    del hyper["params"]
    groups = [Group(names=tuple(named), hyper=hyper, optimizer=name)]
    rule = updates.Rules()
    generator = torch.Generator().manual_seed(seed)
    params, slots = random_tree(generator, dtype, **named), {}
    for _ in range(count):
        grads = random_tree(generator, dtype, **named)
        _, slots = updates.apply(rule, groups, params, slots, grads)
    grads = random_tree(generator, dtype, **named)
    grads.pop("p2", None)

    def direction() -> tuple[Tree, Slots]:
        spaces = updates.apply(rule, groups, params, slots, grads)[1]
        spaces = updates.extend(rule, groups, params, spaces, ())
        theta = random_tree(generator, dtype, **named)
        return theta, {
            slot: {n: torch.randn(v.shape, dtype=dtype, generator=generator) for n, v in t.items()}
            for slot, t in spaces.items()
        }

    tangent, cotangents = direction(), [direction() for _ in range(3)]
    tangent_grads = {
        n: torch.randn(g.shape, dtype=dtype, generator=generator) for n, g in grads.items()
    }
    pushed = updates.pushforward(
        rule, groups, params, slots, grads, tangent[0], tangent[1], tangent_grads
    )
    pulled = updates.pullback(
        rule, groups, params, slots, grads, [c[0] for c in cotangents], [c[1] for c in cotangents]
    )
    assert len(pulled) == 3
    for cotangent, (p, q, w) in zip(cotangents, pulled, strict=True):
        left = dot_state(cotangent, pushed)
        right = dot_state((p, q), tangent) + tree.dot(w, tangent_grads)
        # Relative to the terms, not to their sum, which may cancel.
        size = math.sqrt(
            (1 + dot_state(pushed, pushed)) * (1 + dot_state(cotangent, cotangent))
        ) + math.sqrt((1 + dot_state((p, q), (p, q))) * (1 + dot_state(tangent, tangent)))
        assert abs(left - right) <= (1e-5 if single else 1e-13) * size


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("count", [1, 2, 10, 1000])
def test_the_column_of_the_step_counter_is_the_backward_difference(
    name: str, amsgrad: bool, count: int
) -> None:
    keywords = {"amsgrad": amsgrad, "weight_decay": 0.1}
    rule, groups, params, slots, grads = observed(name, keywords, seed=7, count=5)
    slots["step"] = {n: torch.tensor(float(count)) for n in slots["step"]}
    earlier = {**slots, "step": {n: torch.tensor(count - 1.0) for n in slots["step"]}}
    now, _ = updates.apply(rule, groups, params, slots, grads)
    then, _ = updates.apply(rule, groups, params, earlier, grads)
    difference = tree.subtract(now, then)

    one = {"step": {n: torch.ones((), dtype=F64) for n in grads}}
    pushed, pushed_slots = updates.pushforward(rule, groups, params, slots, grads, {}, one, {})
    assert tree.norm(difference) > 1e-8
    assert_close(pushed, difference, rtol=1e-9, atol=1e-16)
    assert_close(pushed_slots["step"], one["step"])

    cotangent = random_tree(torch.Generator().manual_seed(8))
    later = {"step": {n: torch.tensor(2.5, dtype=F64) for n in grads}}
    [(_, q, _)] = updates.pullback(rule, groups, params, slots, grads, [cotangent], [later])
    for n in grads:
        expected = 2.5 + tree.dot({n: cotangent[n]}, difference)
        assert float(q["step"][n]) == pytest.approx(expected, rel=1e-9)
        assert q["step"][n].shape == ()


def test_a_fresh_step_counter_has_no_column() -> None:
    rule, groups, params, slots, grads = observed("Adam", {}, count=0)
    assert slots == {}
    [(_, q, _)] = updates.pullback(
        rule, groups, params, slots, grads, [random_tree(torch.Generator())], [{}]
    )
    assert "step" not in q
    assert all(tree.is_finite(values) for values in q.values())


@pytest.mark.parametrize(
    "keywords",
    [
        {"momentum": 0.9, "dampening": 0.3},
        {"momentum": 0.5, "dampening": 0.8, "maximize": True},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.0, "weight_decay": 0.1},
    ],
)
@pytest.mark.parametrize("removed", [range(1), range(1, 2), range(3), range(2, 4)])
def test_skipping_updates_of_sgd_is_exact_when_gradients_do_not_depend_on_parameters(
    keywords: dict[str, Any], removed: range
) -> None:
    """SGD is affine then, "the first momentum step has no dampening" included.

    (Dampening with weight decay is not in the list: -d (g + l theta) is a product of coordinates.)
    """
    generator = torch.Generator().manual_seed(9)
    start = random_tree(generator)
    batches = [random_tree(generator) for _ in range(6)]
    run, without = Torch("SGD", start, keywords), Torch("SGD", start, keywords)
    rule, groups = updates.Rules(), run.groups()
    states: list[tuple[Tree, Slots]] = []
    for index, grads in enumerate(batches):
        states.append((run.params(), run.slots()))
        run.step(grads)
        if index not in removed:
            without.step(grads)
    truth = tree.subtract(run.params(), without.params())

    before, after = states[removed.start], states[removed.stop]
    theta = tree.subtract(after[0], before[0])
    extended = updates.extend(rule, groups, after[0], after[1], ())
    earlier = updates.extend(rule, groups, before[0], before[1], ())
    displacement = {s: tree.subtract(extended[s], earlier.get(s, {})) for s in extended}
    moved, state = theta, displacement
    for (params, slots), grads in list(zip(states, batches, strict=True))[removed.stop :]:
        moved, state = updates.pushforward(rule, groups, params, slots, grads, moved, state, {})
    assert_close(moved, truth)

    cotangent = random_tree(generator)
    p, q = [cotangent], [{}]
    for (params, slots), grads in list(zip(states, batches, strict=True))[: removed.stop - 1 : -1]:
        [(p_0, q_0, _)] = updates.pullback(rule, groups, params, slots, grads, p, q)
        p, q = [p_0], [q_0]
    score = dot_state((p[0], q[0]), (theta, displacement))
    assert score == pytest.approx(tree.dot(cotangent, truth), rel=1e-11)


def test_a_started_slot_overrides_the_existence_of_the_buffer() -> None:
    """The counterfactual state s - D has a momentum buffer of zeros; it must act as a fresh one."""
    keywords = {"momentum": 0.9, "dampening": 0.3}
    rule, groups, params, _, grads = observed("SGD", keywords)
    fresh, _ = updates.apply(rule, groups, params, {}, grads)
    zeros = {"momentum_buffer": tree.zeros_like(params)}
    assert tree.norm(tree.subtract(updates.apply(rule, groups, params, zeros, grads)[0], fresh)) > 0
    zeros["started"] = {n: torch.zeros(()) for n in params}
    increments, after = updates.apply(rule, groups, params, zeros, grads)
    assert_close(increments, fresh)
    assert all(float(value) == 1 for value in after["started"].values())


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("count", [0, 3])
@uses_jvp
def test_nothing_infinite_where_the_second_moment_is_zero(
    name: str, amsgrad: bool, dtype: torch.dtype, count: int
) -> None:
    rule, groups, params, slots, grads = observed(name, {"amsgrad": amsgrad}, count=count)
    params, grads = ({n: v.to(dtype) for n, v in t.items()} for t in (params, grads))
    slots = {
        s: {n: v if s == "step" else v.to(dtype) for n, v in t.items()} for s, t in slots.items()
    }
    # Squares to a subnormal number, and to 0 in float32: an infinity in other arrangements.
    grads["bias"][1:3] = torch.tensor([1e-21, 1e-30], dtype=dtype)
    if count:
        for slot in set(slots) - {"step"}:
            slots[slot]["bias"][1:3] = 0
    increments, after = updates.apply(rule, groups, params, slots, grads)
    assert tree.is_finite(increments)

    dead = SHAPES["weight"][0] + 1 + (1 if dtype == torch.float32 else 0)
    assert updates.singular(rule, groups, params, slots, grads, after) == dead
    some = {n: g for n, g in grads.items() if n != "weight"}
    assert updates.singular(rule, groups, params, slots, some, after) < dead

    cotangent = {n: torch.ones_like(v) for n, v in params.items()}
    [(p, q, w)] = updates.pullback(rule, groups, params, slots, grads, [cotangent], [{}])
    pushed, pushed_slots = updates.pushforward(
        rule, groups, params, slots, grads, cotangent, {}, grads
    )
    for values in (p, w, *q.values(), pushed, *pushed_slots.values()):
        assert tree.is_finite(values)
    # Defined as 0: what the second moment is there has no influence.
    assert bool((q["exp_avg_sq"]["weight"][:, 0] == 0).all())

    # While the first moment acts through eps alone.
    rate = groups[0].hyper["lr"] / (1 - 0.9 ** (count + 1))
    torch.testing.assert_close(
        w["weight"][:, 0], torch.full((4,), -rate * 0.1 / 1e-8, dtype=dtype), rtol=1e-5, atol=0
    )

    def increment(slots: Slots, grads: Tree) -> Tree:
        return updates.apply(rule, groups, params, slots, grads)[0]

    inner = {s: values for s, values in after.items() if s != "step"}
    steps = {"step": after["step"]}
    _, vjp = torch.func.vjp(lambda s, g: increment({**s, **steps}, g), inner, grads)
    back_slots, back = vjp({n: torch.ones_like(g) for n, g in grads.items()})
    ones = {s: {n: torch.ones_like(v) for n, v in t.items()} for s, t in inner.items()}
    _, forward = torch.func.jvp(
        lambda s, g: increment({**s, **steps}, g), (inner, grads), (ones, back)
    )
    for values in (back, *back_slots.values(), forward):
        assert tree.is_finite(values)


def test_singular_looks_at_the_second_moment_that_is_used() -> None:
    rule, some = updates.rule_of(torch.optim.Adam), torch.zeros(3)
    slots = {"exp_avg_sq": torch.tensor([0.0, 0.0, 1.0])}
    assert rule.singular(some, some, {}, {}, slots) == 2
    largest = {**slots, "max_exp_avg_sq": torch.tensor([0.0, 2.0, 2.0])}
    assert rule.singular(some, some, {}, {}, largest) == 1


def test_a_negative_second_moment_acts_as_zero() -> None:
    """s - D can have one; runs cannot."""
    rule, groups, params, slots, _ = observed("Adam", {})
    grads = tree.zeros_like(params)
    negative = {**slots, "exp_avg_sq": tree.scale(-1.0, slots["exp_avg_sq"])}
    zero = {**slots, "exp_avg_sq": tree.zeros_like(slots["exp_avg_sq"])}
    increments, after = updates.apply(rule, groups, params, negative, grads)
    assert_close(increments, updates.apply(rule, groups, params, zero, grads)[0])
    assert updates.singular(rule, groups, params, slots, grads, after) == sum(
        v.numel() for v in params.values()
    )
    cotangent = random_tree(torch.Generator())
    [(_, q, w)] = updates.pullback(rule, groups, params, negative, grads, [cotangent], [{}])
    [(_, r, u)] = updates.pullback(rule, groups, params, zero, grads, [cotangent], [{}])
    assert_close(w, u)
    assert_close(q["exp_avg_sq"], r["exp_avg_sq"])
    # Zero by definition, although the first moment is not.
    assert tree.norm(slots["exp_avg"]) > 0
    assert tree.norm(r["exp_avg_sq"]) == 0


def test_sgd_has_no_singular_coordinates() -> None:
    rule, groups, params, slots, grads = observed("SGD", {"momentum": 0.9})
    _, after = updates.apply(rule, groups, params, slots, grads)
    assert updates.singular(rule, groups, params, slots, grads, after) == 0


@pytest.mark.parametrize(("name", "keywords"), [("SGD", {"momentum": 0.9}), ("AdamW", {})])
@uses_jvp
def test_pushforward_can_be_differentiated_again(name: str, keywords: dict[str, Any]) -> None:
    """Second-order propagation is the derivative of the pushforward along itself."""
    rule, groups, params, slots, grads = observed(name, keywords, seed=10)
    generator = torch.Generator().manual_seed(11)
    tangent = {n: v * live(params)[n] for n, v in random_tree(generator).items() if n in grads}

    def pushed(gradient: Tree) -> Tree:
        return updates.pushforward(rule, groups, params, slots, gradient, {}, {}, tangent)[0]

    _, second = torch.func.jvp(pushed, (grads,), (tangent,))
    h = 1e-6
    plus = pushed(tree.add(grads, tree.scale(h, tangent)))
    minus = pushed(tree.subtract(grads, tree.scale(h, tangent)))
    assert_close(second, tree.scale(0.5 / h, tree.subtract(plus, minus)), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(("name", "keywords"), [("SGD", {"momentum": 0.9}), ("Adam", {})])
def test_parameters_without_a_gradient_pass_through(name: str, keywords: dict[str, Any]) -> None:
    rule, groups, params, slots, grads = observed(name, keywords, seed=12)
    del grads["weight"]
    _, after = updates.apply(rule, groups, params, slots, grads)
    assert all(after[slot]["weight"] is values["weight"] for slot, values in slots.items())
    theta, state = random_state(torch.Generator().manual_seed(13), slots)
    [(p, q, w)] = updates.pullback(rule, groups, params, slots, grads, [theta], [state])
    pushed, pushed_slots = updates.pushforward(
        rule, groups, params, slots, grads, theta, state, {"weight": theta["weight"]}
    )
    assert not torch.equal(pushed["bias"], theta["bias"])
    assert set(w) == set(grads)
    for result, results in ((p, q), (pushed, pushed_slots)):
        assert torch.equal(result["weight"], theta["weight"])
        for slot, values in state.items():
            assert torch.equal(results[slot]["weight"], values["weight"])


@over_the_grid
def test_arguments_are_left_alone(name: str, keywords: dict[str, Any]) -> None:
    rule, groups, params, slots, grads = observed(name, keywords)
    theta, state = random_state(torch.Generator().manual_seed(14), slots)
    copies = [tree.clone(t) for t in (params, grads, theta)]
    slot_copies = [tree.clone_slots(s) for s in (slots, state)]
    updates.apply(rule, groups, params, slots, grads)
    updates.pullback(rule, groups, params, slots, grads, [theta, theta], [state, state])
    updates.pushforward(rule, groups, params, slots, grads, theta, state, grads)
    updates.extend(rule, groups, params, slots, grads)
    for kept, value in zip(copies, (params, grads, theta), strict=True):
        assert_close(value, kept, rtol=0, atol=0)
    for kept, value in zip(slot_copies, (slots, state), strict=True):
        assert set(value) == set(kept)
        for slot in kept:
            assert_close(value[slot], kept[slot], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_increments_smaller_than_the_rounding_of_the_parameter_survive(name: str) -> None:
    params = {"gain": torch.tensor(1e6)}
    run = Torch(name, params, {"weight_decay": 0.0})
    run.set_rate(1e-9)
    grads = {"gain": torch.tensor(2.0)}
    increments, _ = updates.apply(updates.Rules(), run.groups(), params, {}, grads)
    expected = -1e-9 * RATES[1] * (2.0 if name == "SGD" else 1.0)
    assert float(increments["gain"]) == pytest.approx(expected, rel=1e-6)
    assert float(params["gain"] + increments["gain"]) == 1e6


def test_adamw_decays_decoupled_where_an_old_group_does_not_say_so() -> None:
    rule, groups, params, slots, grads = observed("AdamW", {"weight_decay": 0.1})
    old = [
        Group(
            names=g.names,
            hyper={k: v for k, v in g.hyper.items() if k != "decoupled_weight_decay"},
            optimizer="AdamW",
        )
        for g in groups
    ]
    now, _ = updates.apply(rule, groups, params, slots, grads)
    assert_close(updates.apply(rule, old, params, slots, grads)[0], now)
    undecided = [Group(g.names, g.hyper, "Adam") for g in old]
    coupled, _ = updates.apply(rule, undecided, params, slots, grads)
    assert tree.norm(tree.subtract(coupled, now)) > 1e-3


def test_refusals_name_what_is_wrong() -> None:
    with pytest.raises(UnsupportedError, match=r"torch\.optim\.LBFGS cannot be recorded"):
        updates.Rules().named("LBFGS")
    rule, groups, params, slots, grads = observed("SGD", {})
    grads["weight"] = grads["weight"].to_sparse()
    with pytest.raises(UnsupportedError, match=r"'weight'.*dense gradients"):
        updates.apply(rule, groups, params, slots, grads)
    complex_weight = {**params, "weight": params["weight"].to(torch.complex128)}
    grads["weight"] = complex_weight["weight"]
    with pytest.raises(UnsupportedError, match=r"'weight'.*complex128"):
        updates.apply(rule, groups, complex_weight, slots, grads)
    with pytest.raises(OptionError, match=r"2 cotangents.*1 of the slots"):
        updates.pullback(rule, groups, params, slots, {}, [params, params], [{}])


def test_rules_name_themselves_and_their_source() -> None:
    for name, rule in updates.CLOSED.items():
        assert rule.name == name
        assert f"torch.optim.{name}" in rule.source
