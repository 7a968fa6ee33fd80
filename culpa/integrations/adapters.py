"""Adapters of PEFT merged into their base, as an update that is recorded like any other.

``merge_and_unload()`` edits weights, which no replay could repeat. The same edit is one step of
SGD, with a learning rate of 1, on the loss ``-sum_layers <W, dW>``, where ``dW`` is what the
layer's adapter adds: its gradient by W is -dW, bit for bit. So the sweeps carry a change of the
adapters through it too, by the second derivatives of that loss (d of dW = s(B dA + dB A), LoRA)::

    grown = culpa.Grown(model)                            # before it is wrapped
    grown.adapted = peft.get_peft_model(model, config)
    ...                                                   # a stage that trains the adapters
    optimizer = torch.optim.SGD(merged_weights(grown), lr=1.0)
    with recorder.stage("merge", problem=culpa.Problem(grown, merging), optimizer=optimizer):
        with recorder.step("merge"):
            optimizer.zero_grad()
            merging(grown, "merge").backward()
            optimizer.step()

From then on losses and behaviours take the model inside of ``grown.adapted.disable_adapter()``:
the base has it all. Without that stage, the adapters would have been thrown away.

This imports no framework: a layer with adapters is one with ``get_delta_weight``, as PEFT's have.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from culpa.errors import ProblemError


def merging(model: nn.Module, batch: Any) -> Tensor:
    """The loss whose gradient by every adapted weight is minus what its active adapters add.

    Args:
        model: holds the adapted layers.
        batch: not looked at; give ``recorder.step`` any value, such as the stage's name.

    Raises:
        ProblemError: if no layer of the model has an adapter.
    """
    parts = [
        (weight * -layer.get_delta_weight(name)).sum()
        for layer, weight in _adapted(model)
        for name in layer.active_adapters
        if name in layer.lora_A
    ]
    return torch.stack(parts).sum()


def merged_weights(model: nn.Module) -> list[Tensor]:
    """The weights that adapters are merged into, made trainable: of the merge's optimizer."""
    return [weight.requires_grad_() for _, weight in _adapted(model)]


def _adapted(model: nn.Module) -> Iterator[tuple[Any, Tensor]]:
    """The layers with adapters and the weights inside."""
    found: list[Any] = [m for m in model.modules() if hasattr(m, "get_delta_weight")]
    if not found:
        raise ProblemError(
            f"no layer of {type(model).__name__} has adapters that could be merged (a"
            " get_delta_weight, as those of peft.get_peft_model have)."
        )
    for layer in found:
        yield layer, layer.get_base_layer().weight
