"""Layers whose second derivatives torch has by many operations, and this package by kernels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from culpa.dynamics import attention, batch_norm, convolution

CONVOLUTIONS: dict[Callable[..., Tensor], int] = {
    torch.conv1d: 1,
    torch.conv2d: 2,
    torch.conv3d: 3,
}
"""Their dimensions."""
ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
"""Of their arguments."""
_NORMALISES = inspect.signature(functional.batch_norm)


class ByKernel(TorchFunctionMode):
    """Inside, models run on this package's attention, batch_norm and convolution, where they can.

    Reverse mode only; differentiable twice.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every call of torch passes here; few of them are ours."""
        found = None
        if func in CONVOLUTIONS:
            given: dict[str, Any] = {**dict(zip(ARGUMENTS, args, strict=False)), **(kwargs or {})}
            found = convolved(given, CONVOLUTIONS[func])
        elif func is functional.batch_norm:
            found = _normalised(_NORMALISES.bind(*args, **(kwargs or {})).arguments)
        elif func is functional.scaled_dot_product_attention:
            found = _attended(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if found is None else found


def convolved(
    given: dict[str, Any], dimensions: int, weights: convolution.Weights = "twice"
) -> Tensor | None:
    """A convolution of ``given`` arguments by kernels; ``None`` where torch's own is to be used.

    ``weights``: see ``convolution.convolve``.
    """
    inputs, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
    at = convolution.geometry(dimensions, **given)
    if at is None or not convolution.written_out(inputs, weight):
        return None
    if torch.is_autocast_enabled(inputs.device.type):
        return None  # it would convolve in half precision, and what the loop did is wanted
    return convolution.convolve(inputs, weight, bias, at, weights)


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    if dropout_p or enable_gqa or torch.is_autocast_enabled(query.device.type):
        return None
    if not attention.written_out(query, key, value, attn_mask, is_causal):
        return None
    return attention.attend(query, key, value, attn_mask, is_causal, scale)


def _normalised(given: Mapping[str, Any]) -> Tensor | None:
    inputs, weight = given["input"], given.get("weight")
    if not given.get("training") or not batch_norm.written_out(inputs, weight):
        return None
    moved = given["running_mean"], given["running_var"], given.get("momentum", 0.1)
    bias, eps = given.get("bias"), given.get("eps", 1e-5)
    return batch_norm.normalise(inputs, weight, bias, eps, moved)[0]
