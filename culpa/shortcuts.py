"""Shortcuts of torch that give wrong derivatives of a module whose parameters are swapped.

``torch.utils.checkpoint`` runs a block again during ``backward``, when the call that swapped the
parameters is over: it would read the module's own ones, silently. Without it a block is run once
and keeps its activations: the same numbers for more memory.

``weight_norm``'s fused kernel takes the norm for a constant when its backward pass is
differentiated (torch 2.13: a Hessian that is not symmetric, 2 % off); without the kernel it is the
formula of its documentation, g v / ||v||.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint


class _RunOnce:
    """Stands for ``CheckpointFunction``, the reentrant way."""

    @staticmethod
    def apply(function: Callable[..., Any], _preserve: bool, *args: Any) -> Any:
        """Run the block, and nothing else."""
        return function(*args)


def _run_once(*_args: Any, **_kwargs: Any) -> Generator[None]:
    """Stands for the generator of the other way, which runs the block between its two steps."""
    yield


def _weight_norm(direction: Tensor, size: Tensor, dim: int = 0) -> Tensor:
    return direction * (size / torch.norm_except_dim(direction, 2, dim))


INSTEAD: tuple[tuple[ModuleType, str, Any], ...] = (
    (checkpoint, "CheckpointFunction", _RunOnce),
    (checkpoint, "_checkpoint_without_reentrant_generator", _run_once),
    (torch, "_weight_norm", _weight_norm),
    (importlib.import_module("torch.nn.utils.weight_norm"), "_weight_norm", _weight_norm),
)
"""What torch looks up in its modules at every call, and what is put there."""


@contextmanager
def without_shortcuts() -> Generator[None]:
    """Neither checkpointing nor fused weight norm inside."""
    before = [(module, name, getattr(module, name)) for module, name, _ in INSTEAD]
    try:
        for module, name, value in INSTEAD:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
