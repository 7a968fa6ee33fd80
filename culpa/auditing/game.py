"""A cooperative game given by all its values: Shapley values and interaction terms.

v is a tensor ``[2^N, Q]`` of Q games with the same N players: bit i of the row's number is set
where player i takes part, so row 0 is nobody and the last row everybody.

Shapley value of i (Shapley 1953), summing to v(all) - v(none):

    phi_i = sum over T without i of |T|! (N - |T| - 1)! / N!  (v(T + i) - v(T))

Shapley interaction index of i and j (Grabisch and Roubens, An axiomatic approach to the concept of
interaction among players in cooperative games, Int. J. of Game Theory 28, 1999):

    I_ij = sum over T without i, j of |T|! (N - |T| - 2)! / (N - 1)!  d_ij(T)
    d_ij(T) = v(T + i + j) - v(T + i) - v(T + j) + v(T)

At the observed run alone, T = all the others, d_ij is tau_i + tau_j - tau_ij: by how much the
effects of removing i and j one at a time exceed that of removing both.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float64
from torch import Tensor

from culpa.errors import OptionError

SOURCE = (
    "Shapley, A value for n-person games, 1953; Grabisch and Roubens, An axiomatic approach to the "
    "concept of interaction among players in cooperative games, Int. J. of Game Theory 28, 1999"
)


def shapley_values(
    values: Float64[Tensor, "subsets behaviours"],
) -> Float64[Tensor, "players behaviours"]:
    """phi_i of a game given by all its values ``[2^N, Q]``, bit i of the row: player i is in."""
    size = _players(values)
    rows: list[Tensor] = []
    for i in range(size):
        without = [s for s in range(len(values)) if not s >> i & 1]
        weights = [_weight(s.bit_count(), size) for s in without]
        gains = values[[s | 1 << i for s in without]] - values[without]
        rows.append((torch.tensor(weights, dtype=torch.float64)[:, None] * gains).sum(0))
    return torch.stack(rows)


def interaction_indices(
    values: Float64[Tensor, "subsets behaviours"],
) -> Float64[Tensor, "players players behaviours"]:
    """I_ij of every pair: d_ij averaged as Shapley averages gains. Symmetric, zero diagonal."""

    def index(i: int, j: int) -> Tensor:
        both, total = 1 << i | 1 << j, torch.zeros(values.shape[1], dtype=torch.float64)
        for subset in range(len(values)):
            if subset & both == both:
                weight = _weight(subset.bit_count() - 2, _players(values) - 1)
                total += weight * _second_difference(values, i, j, subset)
        return total

    return _of_pairs(values, index)


def last_differences(
    values: Float64[Tensor, "subsets behaviours"],
) -> Float64[Tensor, "players players behaviours"]:
    """d_ij of every pair where all the others take part. Symmetric, zero diagonal."""
    return _of_pairs(values, lambda i, j: _second_difference(values, i, j, len(values) - 1))


def _second_difference(values: Tensor, i: int, j: int, subset: int) -> Tensor:
    """d_ij of T = ``subset`` less i and j; ``subset`` contains both."""
    a, b = 1 << i, 1 << j
    return values[subset] - values[subset - a] - values[subset - b] + values[subset - a - b]


def _weight(before: int, size: int) -> float:
    """|T|! (n - |T| - 1)! / n!: how often just those of T come before a given one of n players."""
    return 1.0 / (size * math.comb(size - 1, before))


def _players(values: Tensor) -> int:
    size = len(values).bit_length() - 1
    if size < 1 or len(values) != 2**size:
        raise OptionError(f"a game of N players has 2^N values, N >= 1; got {len(values)}.")
    return size


def _of_pairs(values: Tensor, of: Callable[[int, int], Tensor]) -> Tensor:
    size = _players(values)
    pairs = torch.zeros(size, size, values.shape[1], dtype=torch.float64)
    for i in range(size):
        for j in range(i):
            pairs[i, j] = pairs[j, i] = of(i, j)
    return pairs
