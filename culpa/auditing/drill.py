"""Drilling down: from the scores of all training examples to the few that a person can look at."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch
from jaxtyping import Float64
from torch import Tensor

from culpa.auditing.record import ExampleFindings
from culpa.trajectory.run import Run

SHOWN = 8
"""Examples at each end."""
UPDATES_SHOWN = 20
"""At most so many of the updates that used an example are named."""


class Examples(msgspec.Struct, frozen=True, kw_only=True):
    """Of one behaviour: the examples that helped and hurt most, and the sum over all of them."""

    helpful: list[int]
    harmful: list[int]
    scores: dict[str, float | None]
    updates: dict[str, list[int]]
    total: float | None


def most_helpful_and_harmful(
    run: Run, scores: Float64[Tensor, "examples behaviours"]
) -> list[Examples]:
    """For each behaviour the ``SHOWN`` examples at each end of ``scores``, extremes first.

    An example whose score has not that sign is at neither end. ``updates``: where it was used.
    """
    found: list[Examples] = []
    for q in range(scores.shape[1]):
        column = torch.nan_to_num(scores[:, q], nan=0.0)
        order = torch.argsort(column, stable=True).tolist()
        helpful = [i for i in reversed(order[-SHOWN:]) if column[i] > 0.0]
        harmful = [i for i in order[:SHOWN] if column[i] < 0.0]
        chosen = [*helpful, *harmful]
        found.append(
            Examples(
                helpful=helpful,
                harmful=harmful,
                scores={str(i): float(scores[i, q]) for i in chosen},
                updates=_used(run, chosen),
                total=float(scores[:, q].sum()),
            )
        )
    return found


def example_findings(examples: Sequence[Examples], names: Sequence[str]) -> list[ExampleFindings]:
    """As the record holds them."""
    return [
        ExampleFindings(
            behaviour=name,
            helpful=one.helpful,
            harmful=one.harmful,
            scores={i: float("nan") if v is None else v for i, v in one.scores.items()},
            updates=one.updates,
        )
        for name, one in zip(names, examples, strict=False)
    ]


def _used(run: Run, examples: Sequence[int]) -> dict[str, list[int]]:
    """By example the first updates whose batch held it."""
    found: dict[int, list[int]] = {i: [] for i in examples}
    for k in range(run.num_steps):
        for i in set(run.example_ids(k)) & found.keys():
            if len(found[i]) < UPDATES_SHOWN:
                found[i].append(k)
    return {str(i): updates for i, updates in found.items()}
