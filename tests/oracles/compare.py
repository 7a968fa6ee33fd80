"""Comparators that raise. None of them returns a verdict."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def flat(tree: Mapping[str, Tensor]) -> Tensor:
    """All entries in the order of sorted names, float64."""
    return torch.cat([tree[name].detach().double().reshape(-1) for name in sorted(tree)])


def relative_gap(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||; an expectation of zero is a mistake in the test."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    size = float(expected.double().norm())
    assert size > 0, "nothing to compare with: the expected value is zero"
    return float((found.double() - expected.double()).norm()) / size


def assert_close(found: Tensor, expected: Tensor, relative: float) -> None:
    """Fail unless the norm of the difference is at most ``relative`` times the expected norm."""
    gap = relative_gap(found, expected)
    assert gap <= relative, f"relative gap {gap:.3e} > {relative:.0e}: {found} against {expected}"


def assert_tree_close(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], relative: float
) -> None:
    """``assert_close`` over all tensors together; the names must be the same."""
    assert set(found) == set(expected), (sorted(found), sorted(expected))
    assert_close(flat(found), flat(expected), relative)


def assert_bitwise(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Same names, dtypes, shapes and bits."""
    assert set(found) == set(expected), (sorted(found), sorted(expected))
    assert expected, "nothing to compare"
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), (
            f"{name} differs by up to {(found[name].double() - value.double()).abs().max():.3e}"
        )


def pearson(a: Tensor, b: Tensor) -> float:
    """Correlation of two vectors in float64."""
    assert a.shape == b.shape == (a.numel(),), (a.shape, b.shape)
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return float(a @ b / (a.norm() * b.norm()))


def difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """a - b by name."""
    assert set(a) == set(b)
    return {name: a[name] - b[name] for name in a}
