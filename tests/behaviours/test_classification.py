"""The expected calibration error, bin by bin, against a reference in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from culpa import behaviours


class Logits(nn.Module):
    """A model whose inputs are the logits."""

    def forward(self, logits: Tensor) -> Tensor:
        return logits


def reference(sure: list[float], right: list[bool], bins: int) -> float:
    """Guo et al. 2017, equation 3: bin i of n holds confidences in ((i - 1)/n, i/n]."""
    error = 0.0
    for i in range(1, bins + 1):
        inside = [k for k, p in enumerate(sure) if (i - 1) / bins < p <= i / bins]
        if inside:
            confidence = sum(sure[k] for k in inside) / len(inside)
            accuracy = sum(right[k] for k in inside) / len(inside)
            error += len(inside) / len(sure) * abs(accuracy - confidence)
    return error


def measured(points: list[tuple[float, bool]], bins: int) -> float:
    """The library's, of two classes of which the first has the given probability and is chosen."""
    odds = [[math.log(p / (1 - p)) if p < 1 else 1e3, 0.0] for p, _ in points]
    logits = torch.tensor(odds, dtype=torch.float64)
    targets = torch.tensor([0 if right else 1 for _, right in points])
    found = behaviours.calibration_error("ece", (logits, targets), bins=bins)
    return float(found.values(Logits()).mean())


@pytest.mark.parametrize(
    ("points", "bins"),
    [
        # Sure and right in one bin, sure and wrong in its neighbour: merged, they cancel.
        ([(0.95, True), (0.85, False)], 10),
        ([(0.65, True), (0.75, False), (0.85, True), (0.95, False)], 10),
        # On the edge: a half belongs to the lower bin, one to the highest.
        ([(0.5, False), (0.9, True)], 2),
        ([(1.0, True), (0.9, False), (0.7, False)], 4),
    ],
)
def test_neighbouring_bins_are_apart(points: list[tuple[float, bool]], bins: int) -> None:
    expected = reference([p for p, _ in points], [right for _, right in points], bins)
    assert measured(points, bins) == pytest.approx(expected, abs=1e-12)


@given(
    points=st.lists(st.tuples(st.floats(0.501, 0.999), st.booleans()), min_size=1, max_size=30),
    bins=st.integers(1, 20),
)
def test_any_number_of_bins(points: list[tuple[float, bool]], bins: int) -> None:
    # At an edge the softmax's last bit would decide.
    assume(all(abs(p * bins - round(p * bins)) > 1e-6 for p, _ in points))
    expected = reference([p for p, _ in points], [right for _, right in points], bins)
    assert measured(points, bins) == pytest.approx(expected, abs=1e-9)
