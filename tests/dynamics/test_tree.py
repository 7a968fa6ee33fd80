"""Arithmetic on trees whose missing entries are zeros, against vectors in float64."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from culpa import tree
from culpa.tree import Tree

SHAPES = {"a": (3, 2), "b": (4,), "c": (), "d": (0, 5), "e": (2, 3)}
DTYPES = {"a": torch.float64, "b": torch.float32, "c": torch.float64, "d": torch.float32}
NAMES = st.sets(st.sampled_from(sorted(SHAPES)))


def made(names: set[str], seed: int) -> Tree:
    """Some of the tensors; one does not lie in memory as it is read."""
    generator = torch.Generator().manual_seed(seed)
    found = {
        n: torch.randn(SHAPES[n], generator=generator, dtype=DTYPES.get(n, torch.bfloat16))
        for n in sorted(names)
    }
    return {n: v.T.contiguous().T if n == "a" else v for n, v in found.items()}


def whole(values: Tree) -> Tensor:
    """One vector, zeros where an entry is missing."""
    parts = [values.get(n, torch.zeros(SHAPES[n])).double().reshape(-1) for n in SHAPES]
    return torch.cat(parts)


@given(NAMES, NAMES, st.integers(0, 9), st.sampled_from([1.0, -1.0, 0.0, 0.3, -2.5]))
def test_sums_and_products(left: set[str], right: set[str], seed: int, factor: float) -> None:
    a, b = made(left, seed), made(right, seed + 100)
    kept = tree.clone(a), tree.clone(b)
    found = tree.add(a, b, factor)
    assert found.keys() == a.keys() | b.keys()
    rough = {"rtol": 1e-2, "atol": 2e-2}  # bfloat16
    torch.testing.assert_close(whole(found), whole(a) + factor * whole(b), **rough)
    torch.testing.assert_close(whole(tree.subtract(a, b)), whole(a) - whole(b), **rough)
    fine = {n: v for n, v in found.items() if n != "e"}
    expected = whole({n: v for n, v in a.items() if n != "e"})
    expected = expected + factor * whole({n: v for n, v in b.items() if n != "e"})
    torch.testing.assert_close(whole(fine), expected, rtol=1e-6, atol=1e-6)
    inner = float(whole(a) @ whole(b))
    assert abs(tree.dot(a, b) - inner) <= 1e-6 * float(whole(a).norm() * whole(b).norm())
    assert abs(tree.norm(a) - float(whole(a).norm())) <= 1e-6 * float(whole(a).norm())
    for before, after in zip(kept, (a, b), strict=True):
        assert all(torch.equal(before[n], after[n]) for n in before)


def test_integers_and_gradients_pass() -> None:
    counts = {"n": torch.tensor([3, 5])}
    assert tree.add(counts, counts)["n"].tolist() == [6, 10]
    assert tree.add(counts, counts, -1.0)["n"].tolist() == [0, 0]
    leaf = torch.ones(3, requires_grad=True)
    assert tree.dot({"x": leaf}, {"x": leaf}) == 3.0


def test_norms_of_what_squares_to_nothing_or_beyond() -> None:
    for size in (1e-30, 1e30):
        found = tree.norm({"x": torch.full((4,), size)})
        assert abs(found - 2 * size) <= 1e-6 * size
