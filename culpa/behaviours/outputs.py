"""Calling a model: the inputs and outputs that are in use, and what to say of others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from culpa.errors import BehaviourError


def predict(model: nn.Module, inputs: Any, what: str) -> Tensor:
    """``model(inputs)``, or ``model(**inputs)`` for a mapping; its ``logits`` if it names them."""
    if isinstance(inputs, Mapping):
        found = model(**cast("Mapping[str, Any]", inputs))
    else:
        found = model(inputs)
    found = getattr(found, "logits", found)
    if not isinstance(found, Tensor):
        raise BehaviourError(
            f"{what} needs a model that returns a tensor or an object with .logits, got"
            f" {type(found).__name__}. Write culpa.Behaviour(name, function, batch) with your own"
            " function(model, batch) -> [n]."
        )
    return found


def classify(model: nn.Module, batch: tuple[Any, Tensor], what: str) -> tuple[Tensor, Tensor]:
    """Logits ``[n, classes]`` and targets int64 ``[n]``, checked against each other."""
    inputs, targets = batch
    logits = predict(model, inputs, what)
    if logits.ndim != 2 or targets.ndim != 1 or logits.shape[0] != targets.shape[0]:
        raise BehaviourError(
            f"{what} needs logits [n, classes] and targets [n], got "
            f"{tuple(logits.shape)} and {tuple(targets.shape)}."
        )
    classes = logits.shape[1]
    inside = (targets >= 0) & (targets < classes)
    if targets.is_floating_point() or not bool(inside.all()):
        raise BehaviourError(
            f"{what} needs integer targets from 0 to {classes - 1}, the classes of the"
            f" logits; got {targets.dtype} from {targets.min().item()} to {targets.max().item()}."
        )
    return logits, targets
