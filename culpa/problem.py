"""The training problem: a model and the loss its loop minimises, as a function of parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from culpa.errors import OptionError, ProblemError
from culpa.tree import Tree

Loss = Callable[[nn.Module, Any], Tensor]
"""``loss(model, batch) -> scalar``: what the loop calls ``.backward()`` on for one micro-batch."""
Function = Callable[[nn.Module, Any], Any]
"""Any function of a model and a batch that a user wrote; what it returns is checked afterwards."""


class Problem:
    """What a training loop minimises.

    Args:
        model: the module that is trained. culpa borrows it for replays and products and leaves it
            as it found it.
        loss: ``loss(model, batch) -> scalar tensor``, exactly what the loop calls ``.backward()``
            on for one micro-batch. It must use the ``model`` it is given.
        example_losses: optional ``example_losses(model, batch) -> [B]`` whose mean is ``loss``;
            needed for scores of single training examples.

    Raises:
        OptionError: if ``model`` is no module or a loss is not callable.
    """

    def __init__(self, model: nn.Module, loss: Loss, example_losses: Loss | None = None) -> None:
        if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise OptionError(
                f"Problem(model=...) must be a torch.nn.Module, got {type(model).__name__}. "
                "Pass the module itself, not its parameters or its class."
            )
        for name, function in (("loss", loss), ("example_losses", example_losses)):
            if function is not None and not callable(function):
                raise OptionError(
                    f"Problem({name}=...) must be a function (model, batch) -> tensor, "
                    f"got {type(function).__name__}."
                )
        self.model = model
        self.loss = loss
        self.example_losses = example_losses
        self._bound = _Bound(model)

    def evaluate(self, batch: Any) -> Tensor:
        """The loss of one micro-batch at the model as it is, checked to be a finite scalar."""
        value = check_loss(self.loss(self.model, batch))
        if not bool(torch.isfinite(value.detach())):
            raise ProblemError(
                f"the loss is {float(value.detach())}, which is not finite. Nothing can be "
                "attributed in a run that diverged: lower the learning rate or clip gradients."
            )
        return value

    def loss_at(self, params: Mapping[str, Tensor], buffers: Tree, batch: Any) -> Tensor:
        """The loss as a pure function: differentiable in ``params``, ``buffers`` may be written."""
        return check_loss(self._bound.call(self.loss, params, buffers, batch))

    def example_losses_at(self, params: Mapping[str, Tensor], buffers: Tree, batch: Any) -> Tensor:
        """The losses of the examples of a micro-batch, shape ``[B]``, as a pure function."""
        if self.example_losses is None:
            raise OptionError(
                "examples=True needs Problem(model, loss, example_losses=...): a function "
                "(model, batch) -> [B] whose mean is the loss."
            )
        losses = self._bound.call(self.example_losses, params, buffers, batch)
        if not isinstance(losses, Tensor) or losses.ndim != 1:
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ProblemError(
                f"example_losses(model, batch) must return a tensor of shape [B], got {got}. "
                "Use reduction='none' and do not average."
            )
        return losses

    def call_at(
        self, function: Function, params: Mapping[str, Tensor], buffers: Tree, batch: Any
    ) -> Any:
        """``function(model, batch)`` with the model's tensors replaced, the model untouched."""
        return self._bound.call(function, params, buffers, batch)


class _Bound(nn.Module):
    """Wraps a model so that ``functional_call`` can swap its tensors under any function of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Function, batch: Any) -> Any:
        return function(self.model, batch)

    def call(
        self, function: Function, params: Mapping[str, Tensor], buffers: Tree, batch: Any
    ) -> Any:
        tensors = {f"model.{n}": t for n, t in params.items()}
        # Clones: a module in train mode writes its running statistics into what it is given.
        tensors |= {f"model.{n}": t.clone() for n, t in buffers.items()}
        return functional_call(self, tensors, (function, batch))


def check_loss(value: Any) -> Tensor:
    """Return ``value`` if it is a scalar floating-point tensor, else say what it is."""
    if not isinstance(value, Tensor):
        raise ProblemError(
            f"loss(model, batch) must return a scalar tensor, got {type(value).__name__}. "
            "Return the tensor you call .backward() on."
        )
    if value.ndim != 0 or not value.is_floating_point():
        raise ProblemError(
            f"loss(model, batch) must return a scalar floating-point tensor, got shape "
            f"{tuple(value.shape)} and dtype {value.dtype}. Reduce it with .mean() or .sum(), "
            "as your loop does before .backward()."
        )
    return value
