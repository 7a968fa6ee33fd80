"""Layers whose second derivatives torch has by many operations, and this package by kernels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from culpa.dynamics import batch_norm, convolution

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
    """Inside, models run on ``batch_norm`` and ``convolution`` of this package, where they can.

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
        return func(*args, **(kwargs or {})) if found is None else found


def convolved(given: dict[str, Any], dimensions: int, apart: bool = False) -> Tensor | None:
    """A convolution of ``given`` arguments by kernels; ``None`` where torch's own is to be used.

    ``apart``: see ``convolution.convolve``.
    """
    inputs, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
    at = convolution.geometry(dimensions, **given)
    if at is None or not convolution.written_out(inputs, weight):
        return None
    if torch.is_autocast_enabled(inputs.device.type):
        return None  # it would convolve in half precision, and what the loop did is wanted
    return convolution.convolve(inputs, weight, bias, at, apart)


def _normalised(given: Mapping[str, Any]) -> Tensor | None:
    inputs, weight = given["input"], given.get("weight")
    if not given.get("training") or not batch_norm.written_out(inputs, weight):
        return None
    bias, eps = given.get("bias"), given.get("eps", 1e-5)
    out, mean, variance = batch_norm.normalise(inputs, weight, bias, eps)
    with torch.no_grad():
        for name, value in (("running_mean", mean), ("running_var", variance)):
            if given[name] is not None:
                given[name].lerp_(value.to(given[name].dtype), given.get("momentum", 0.1))
    return out
