"""Gaps between groups: what fairness audits ask about."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from culpa.behaviour import Behaviour
from culpa.errors import OptionError


def group_gap(name: str, first: Behaviour, second: Behaviour) -> Behaviour:
    """The mean of ``first`` minus the mean of ``second``, as one behaviour.

    Args:
        name: how tables and reports call it.
        first, second: one behaviour on the test points of two groups, in one unit.

    Returns:
        A behaviour over all n test points whose mean is the gap: those of the first group count
        n / n_first, those of the second -n / n_second.

    Raises:
        OptionError: if the units differ.
    """
    if first.unit != second.unit:
        raise OptionError(
            f"group_gap needs behaviours of one unit, got {first.unit!r} of {first.name!r} and"
            f" {second.unit!r} of {second.name!r}."
        )
    gap = partial(_gap, first=first, second=second)
    return Behaviour(name, gap, (first.batch, second.batch), unit=first.unit)


def _gap(model: nn.Module, batches: tuple[Any, Any], first: Behaviour, second: Behaviour) -> Tensor:
    one = first.checked(first.function(model, batches[0]))
    other = second.checked(second.function(model, batches[1]))
    count = len(one) + len(other)
    return torch.cat([one * (count / len(one)), other * (-count / len(other))])
