"""Layers whose second derivatives torch has by many operations, and this package by kernels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]
from torch.overrides import TorchFunctionMode

from culpa.dynamics import batch_norm, convolution

_CONVOLUTIONS: dict[Callable[..., Tensor], int] = {
    torch.conv1d: 1,
    torch.conv2d: 2,
    torch.conv3d: 3,
}
"""Their dimensions."""
_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
"""Of their arguments."""
_NORMALISES = inspect.signature(functional.batch_norm)


def gains(model: nn.Module) -> bool:
    """Whether a model has such layers."""
    return any(isinstance(module, _BatchNorm | _ConvNd) for module in model.modules())


class ByKernel(TorchFunctionMode):
    """Inside, models run on ``batch_norm`` and ``convolution`` of this package, where they can.

    Reverse mode only; differentiable twice.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every call of torch passes here; few of them are ours."""
        found = None
        if func in _CONVOLUTIONS:
            given: dict[str, Any] = {**dict(zip(_NAMES, args, strict=False)), **(kwargs or {})}
            found = _convolved(given, _CONVOLUTIONS[func])
        elif func is functional.batch_norm:
            found = _normalised(_NORMALISES.bind(*args, **(kwargs or {})).arguments)
        return func(*args, **(kwargs or {})) if found is None else found


def _convolved(given: dict[str, Any], dimensions: int) -> Tensor | None:
    inputs, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
    at = convolution.geometry(dimensions, **given)
    if at is None or not convolution.written_out(inputs, weight):
        return None
    if torch.is_autocast_enabled(inputs.device.type):
        return None  # it would convolve in half precision, and what the loop did is wanted
    return convolution.convolve(inputs, weight, bias, at)


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
