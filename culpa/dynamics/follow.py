"""Normalisation layers on running statistics that are values of a function, not memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from culpa.dynamics import batch_norm
from culpa.tree import Tree

_CALLS: dict[Callable[..., Tensor], tuple[inspect.Signature, str]] = {
    functional.batch_norm: (inspect.signature(functional.batch_norm), "training"),
    functional.instance_norm: (inspect.signature(functional.instance_norm), "use_input_stats"),
}
"""What normalises, and the argument that says whether by the batch."""


@dataclass
class Follow(TorchFunctionMode):
    """Runs normalisation on running statistics that are values of a function, not memory.

    ``held`` are the tensors that the modules hold, ``values`` what stands for them; both by name.
    ``values`` moves on as the layers are called; ``read`` gathers those that an output depends on.
    """

    held: Tree
    values: Tree
    read: set[str] = field(default_factory=set[str])

    def __post_init__(self) -> None:
        """Know the tensors by identity, which is how they come in."""
        super().__init__()
        self._names = {id(value): name for name, value in self.held.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every call of torch passes here; two of them are ours."""
        if func not in _CALLS:
            return func(*args, **(kwargs or {}))
        signature, by_batch = _CALLS[func]
        bound = signature.bind(*args, **(kwargs or {}))
        bound.apply_defaults()
        given = bound.arguments
        mean, variance = (self._names.get(id(given[f"running_{s}"])) for s in ("mean", "var"))
        if mean is None or variance is None:
            return func(**given)
        if not given[by_batch]:
            self.read |= {mean, variance}
            return _normalised(given, self.values[mean], self.values[variance])
        out, *made = _by_batch(func, given, self.values[mean].dtype)
        share = float(given["momentum"])
        for name, of in zip((mean, variance), made, strict=True):
            self.values[name] = (1.0 - share) * self.values[name] + share * of
        return out


def _by_batch(func: Any, given: Mapping[str, Any], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The layer in training mode, and the mean and the variance that its statistics move to."""
    inputs: Tensor = given["input"]
    instances = func is functional.instance_norm
    if not instances and inputs.dtype == dtype and batch_norm.written_out(inputs, given["weight"]):
        moved = given["running_mean"], given["running_var"], float(given["momentum"])
        return batch_norm.normalise(inputs, given["weight"], given["bias"], given["eps"], moved)
    out = func(**{**given, "running_mean": None, "running_var": None})
    made = [_statistic(stat, inputs.to(dtype), instances) for stat in (torch.mean, torch.var)]
    return out, *made


def _statistic(stat: Callable[..., Tensor], inputs: Tensor, instances: bool) -> Tensor:
    """Of every channel: over the batch, or over each instance and then averaged."""
    if instances:
        return stat(inputs, tuple(range(2, inputs.ndim))).mean(0)
    return stat(inputs, (0, *range(2, inputs.ndim)))


def _normalised(given: Mapping[str, Any], mean: Tensor, variance: Tensor) -> Tensor:
    """The layer in evaluation mode, written out: torch's own is constant in the statistics."""
    inputs: Tensor = given["input"]
    shape = (1, -1, *(1,) * (inputs.ndim - 2))
    factor = torch.rsqrt(variance + given["eps"])
    if given["weight"] is not None:
        factor = factor * given["weight"]
    out = (inputs - mean.view(shape)) * factor.view(shape)
    if given["bias"] is not None:
        out = out + given["bias"].view(shape)
    return out.to(inputs.dtype)
