"""Behaviours of models whose outputs are numbers or representations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from culpa.behaviour import Behaviour
from culpa.behaviours.outputs import predict
from culpa.errors import BehaviourError, OptionError


def regression_error(
    name: str, batch: tuple[Any, Tensor], *, kind: str = "squared", unit: str = ""
) -> Behaviour:
    """The error of each prediction; higher is worse.

    Args:
        name: how tables and reports call it.
        batch: ``(inputs, targets)``; ``model(inputs)`` and the targets have one shape, ``[n]`` or
            ``[n, ...]``: the error is the mean over everything but the first dimension.
        kind: ``"squared"`` or ``"absolute"``.
        unit: of the error, for axes and tables.
    """
    if kind not in ("squared", "absolute"):
        raise OptionError(f"regression_error(kind=...) is 'squared' or 'absolute', got {kind!r}.")
    return Behaviour(name, partial(_regression_error, kind=kind), batch, unit=unit)


def _regression_error(model: nn.Module, batch: tuple[Any, Tensor], kind: str) -> Tensor:
    inputs, targets = batch
    found = predict(model, inputs, "regression_error")
    if found.shape != targets.shape or found.ndim == 0:
        raise BehaviourError(
            "regression_error needs predictions and targets of one shape [n, ...], got"
            f" {tuple(found.shape)} and {tuple(targets.shape)}: a difference of other shapes would"
            " be broadcast."
        )
    off = found - targets
    errors = off.square() if kind == "squared" else off.abs()
    return errors.reshape(len(errors), -1).mean(1)


def embedding_similarity(
    name: str,
    embed: Callable[[nn.Module, Any], Tensor],
    pairs: tuple[Any, Any],
) -> Behaviour:
    """Cosine similarity of the two representations of each pair, from -1 to 1.

    Args:
        name: how tables and reports call it.
        embed: ``embed(model, inputs) -> [n, d]``: the representation that is asked about.
        pairs: the inputs of the first and of the second members, n each.
    """
    return Behaviour(name, partial(_similarity, embed=embed), pairs, unit="cosine")


def _similarity(
    model: nn.Module, pairs: tuple[Any, Any], embed: Callable[[nn.Module, Any], Tensor]
) -> Tensor:
    first, second = embed(model, pairs[0]), embed(model, pairs[1])
    if first.ndim != 2 or first.shape != second.shape:
        raise BehaviourError(
            "embedding_similarity needs embed(model, inputs) -> [n, d] of one shape for both"
            f" members of the pairs, got {tuple(first.shape)} and {tuple(second.shape)}."
        )
    return torch.cosine_similarity(first, second, dim=1)
