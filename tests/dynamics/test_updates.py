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

F64 = torch.float64
SHAPES: dict[str, tuple[int, ...]] = {"weight": (4, 3), "bias": (4,), "head": (2, 4), "gain": ()}
GROUPS = (("weight", "bias"), ("head", "gain"))
RATES = (1.0, 0.3)  # of the two groups, times the schedule
SCHEDULE = (0.05, 0.04, 0.06, 0.0, 0.03)


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
) -> tuple[updates.Rule, list[Group], Tree, Slots, Tree]:
    """(rule, groups, params, slots, grads) of the update after ``count`` updates of torch."""
    generator = torch.Generator().manual_seed(seed)
    run = Torch(name, random_tree(generator), keywords)
    for index in range(count):
        run.step(gradients(generator, index))
    grads = gradients(generator, count)
    return updates.rule_for(name), run.groups(), run.params(), run.slots(), grads


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
    rule = updates.rule_for(name)
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
    groups = [Group(names=tuple(named), hyper=hyper)]
    rule = updates.rule_for(name)
    generator = torch.Generator().manual_seed(seed)
    params, slots = random_tree(generator, dtype, **named), {}
    for _ in range(count):
        grads = random_tree(generator, dtype, **named)
        _, slots = updates.apply(rule, groups, params, slots, grads)
    grads = random_tree(generator, dtype, **named)
    grads.pop("p2", None)

    def direction() -> tuple[Tree, Slots]:
        spaces = updates.apply(rule, groups, params, slots, grads)[1]
        spaces = updates.extend(rule, spaces)
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
    rule, groups = updates.rule_for("SGD"), run.groups()
    states: list[tuple[Tree, Slots]] = []
    for index, grads in enumerate(batches):
        states.append((run.params(), run.slots()))
        run.step(grads)
        if index not in removed:
            without.step(grads)
    truth = tree.subtract(run.params(), without.params())

    before, after = states[removed.start], states[removed.stop]
    theta = tree.subtract(after[0], before[0])
    extended = updates.extend(rule, after[1])
    earlier = updates.extend(rule, before[1])
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
    assert updates.singular(rule, after, grads) == dead
    assert updates.singular(rule, after, {n: g for n, g in grads.items() if n != "weight"}) < dead

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
    rule = updates.rule_for("Adam")
    slots = {"exp_avg_sq": torch.tensor([0.0, 0.0, 1.0])}
    assert rule.singular(slots) == 2
    assert rule.singular({**slots, "max_exp_avg_sq": torch.tensor([0.0, 2.0, 2.0])}) == 1


def test_a_negative_second_moment_acts_as_zero() -> None:
    """s - D can have one; runs cannot."""
    rule, groups, params, slots, _ = observed("Adam", {})
    grads = tree.zeros_like(params)
    negative = {**slots, "exp_avg_sq": tree.scale(-1.0, slots["exp_avg_sq"])}
    zero = {**slots, "exp_avg_sq": tree.zeros_like(slots["exp_avg_sq"])}
    increments, after = updates.apply(rule, groups, params, negative, grads)
    assert_close(increments, updates.apply(rule, groups, params, zero, grads)[0])
    assert updates.singular(rule, after, grads) == sum(v.numel() for v in params.values())
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
    assert updates.singular(rule, after, grads) == 0


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
    updates.extend(rule, slots)
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
    increments, _ = updates.apply(updates.rule_for(name), run.groups(), params, {}, grads)
    expected = -1e-9 * RATES[1] * (2.0 if name == "SGD" else 1.0)
    assert float(increments["gain"]) == pytest.approx(expected, rel=1e-6)
    assert float(params["gain"] + increments["gain"]) == 1e6


def test_adamw_decays_decoupled_where_an_old_group_does_not_say_so() -> None:
    rule, groups, params, slots, grads = observed("AdamW", {"weight_decay": 0.1})
    old = [
        Group(
            names=g.names,
            hyper={k: v for k, v in g.hyper.items() if k != "decoupled_weight_decay"},
        )
        for g in groups
    ]
    now, _ = updates.apply(rule, groups, params, slots, grads)
    assert_close(updates.apply(rule, old, params, slots, grads)[0], now)
    coupled, _ = updates.apply(updates.rule_for("Adam"), old, params, slots, grads)
    assert tree.norm(tree.subtract(coupled, now)) > 1e-3


def test_refusals_name_what_is_wrong() -> None:
    with pytest.raises(UnsupportedError, match=r"'LBFGS'.*SGD, Adam, AdamW.*replay"):
        updates.rule_for("LBFGS")
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
    for name, rule in updates.RULES.items():
        assert rule.name == name
        assert f"torch.optim.{name}" in rule.source
