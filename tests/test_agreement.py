"""``culpa.agreement`` against formulas written out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import culpa


def ranks(values: Tensor) -> Tensor:
    """Average ranks from 1: ties share the mean of their places."""
    below = (values[None, :] < values[:, None]).sum(1).double()
    equal = (values[None, :] == values[:, None]).sum(1).double()
    return below + (equal + 1) / 2


def correlation(a: Tensor, b: Tensor) -> float:
    return float(np.corrcoef(a.double().numpy(), b.double().numpy())[0, 1])


def sample(seed: int, ties: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(50, generator=generator, dtype=torch.float64)
    estimate = 0.7 * truth + 0.4 * torch.randn(50, generator=generator, dtype=torch.float64) + 0.3
    if ties:
        truth, estimate = (4 * truth).round() + 0.5, (4 * estimate).round() + 0.5
    return estimate, truth


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_every_number_against_its_formula(seed: int, ties: bool) -> None:
    estimate, truth = sample(seed, ties)
    found = culpa.agreement(estimate, truth)
    assert found.pearson == pytest.approx(correlation(estimate, truth), abs=1e-12)
    assert found.spearman == pytest.approx(correlation(ranks(estimate), ranks(truth)), abs=1e-12)
    assert found.sign == pytest.approx(float((estimate.sign() == truth.sign()).double().mean()))
    slope, _ = np.polyfit(estimate.numpy(), truth.numpy(), 1)
    assert found.slope == pytest.approx(float(slope), rel=1e-9)
    error = np.linalg.norm((estimate - truth).numpy()) / np.linalg.norm(truth.numpy())
    assert found.relative_error == pytest.approx(float(error), rel=1e-12)


def test_a_perfect_estimate() -> None:
    _, truth = sample(0)
    found = culpa.agreement(truth, truth)
    assert [found.pearson, found.spearman, found.sign, found.slope] == pytest.approx([1.0] * 4)
    assert found.relative_error == 0


def test_half_the_size_has_slope_two() -> None:
    # truth = slope * estimate + c: an estimate that is too small has a slope above one.
    _, truth = sample(0)
    found = culpa.agreement(0.5 * truth, truth)
    assert found.slope == pytest.approx(2.0)
    assert found.pearson == pytest.approx(1.0)
    assert found.relative_error == pytest.approx(0.5)


def test_the_opposite() -> None:
    _, truth = sample(0)
    found = culpa.agreement(-truth, truth)
    assert [found.pearson, found.spearman, found.slope] == pytest.approx([-1.0] * 3)
    assert found.sign == 0
    assert found.relative_error == pytest.approx(2.0)


def test_the_two_arguments_are_not_interchangeable() -> None:
    estimate, truth = sample(1)
    there, back = culpa.agreement(estimate, truth), culpa.agreement(truth, estimate)
    assert there.pearson == pytest.approx(back.pearson)
    assert there.slope != pytest.approx(back.slope)
    assert there.relative_error != pytest.approx(back.relative_error)


def test_a_monotone_bend_keeps_the_ranks() -> None:
    _, truth = sample(2)
    found = culpa.agreement(truth.exp(), truth)
    assert found.spearman == pytest.approx(1.0)
    assert found.pearson < 0.99


def test_a_constant_has_no_correlation() -> None:
    _, truth = sample(0)
    flat = torch.full((50,), 2.0, dtype=torch.float64)
    found = culpa.agreement(flat, truth)
    assert math.isnan(found.pearson)
    assert math.isnan(found.spearman)
    assert math.isnan(found.slope)
    assert found.relative_error == pytest.approx(float((flat - truth).norm() / truth.norm()))
    other = culpa.agreement(truth, flat)
    assert math.isnan(other.pearson)
    assert math.isnan(other.spearman)
    assert other.slope == pytest.approx(0.0, abs=1e-12)


def test_many_dimensions_are_all_points() -> None:
    estimate, truth = sample(0)
    found = culpa.agreement(estimate.reshape(5, 10), truth.reshape(5, 10))
    assert found.pearson == pytest.approx(correlation(estimate, truth), abs=1e-12)


def test_single_precision_is_judged_in_double() -> None:
    estimate, truth = sample(0)
    found = culpa.agreement(1e-25 * estimate.float(), 1e-25 * truth.float())
    assert found.pearson == pytest.approx(correlation(estimate, truth), abs=1e-6)
    assert found.relative_error == pytest.approx(
        float((estimate - truth).norm() / truth.norm()), rel=1e-5
    )


@pytest.mark.parametrize(("a", "b"), [((4,), (5,)), ((2, 3), (3, 2)), ((6,), (2, 3))])
def test_shapes_that_do_not_match(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(culpa.CulpaError) as caught:
        culpa.agreement(torch.ones(a), torch.ones(b))
    for shape in (a, b):
        assert ", ".join(map(str, shape)) in str(caught.value)


def test_nothing_agrees_with_nothing() -> None:
    with pytest.raises(culpa.CulpaError, match="0"):
        culpa.agreement(torch.ones(0), torch.ones(0))
