"""Behaviours: the performance functions gamma whose value stages are credited or blamed for."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from culpa.errors import BehaviourError, OptionError


class Behaviour:
    """A performance function gamma, evaluated in evaluation mode; its value is the mean.

    Args:
        name: how tables and reports call it.
        function: ``function(model, batch) -> [n]``, one number per test point. Higher means more
            of the behaviour. It must use the ``model`` it is given, and be differentiable in the
            model's parameters for ``culpa.attribute`` and ``StageEmbeddings.score``.
        batch: what ``function`` receives, unchanged.
        unit: the unit of the numbers, for axes and tables.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[nn.Module, Any], Tensor],
        batch: Any,
        unit: str = "nats",
    ) -> None:
        if not name:
            raise OptionError("Behaviour(name=...) must not be empty: tables are labelled with it.")
        if not callable(function):
            raise OptionError(
                f"Behaviour(function=...) must be a function (model, batch) -> [n], "
                f"got {type(function).__name__}."
            )
        self.name = name
        self.function = function
        self.batch = batch
        self.unit = unit

    def __repr__(self) -> str:
        return f"Behaviour({self.name!r}, unit={self.unit!r})"

    def checked(self, values: Any) -> Tensor:
        """Return ``values`` if they are one finite number per test point, else raise."""
        given = (
            f"behaviour {self.name!r} must return a tensor of shape [n], one number a test point"
        )
        if not isinstance(values, Tensor):
            raise BehaviourError(f"{given}; got {type(values).__name__}.")
        if values.ndim != 1 or values.shape[0] == 0:
            raise BehaviourError(
                f"{given}; got shape {tuple(values.shape)}. Do not average over the test points."
            )
        if not values.is_floating_point():
            values = values.to(torch.get_default_dtype())
        if not bool(torch.isfinite(values.detach()).all()):
            bad = int((~torch.isfinite(values.detach())).sum())
            raise BehaviourError(f"{given}; {bad} of {values.shape[0]} are not finite.")
        return values

    def values(self, model: nn.Module) -> Float64[Tensor, " n"]:
        """gamma at the model as it is, in evaluation mode: float64 ``[n]``, on the CPU.

        No gradient.
        """
        with evaluation_mode(model), torch.no_grad():
            return self.checked(self.function(model, self.batch)).double().cpu()


@contextmanager
def evaluation_mode(model: nn.Module) -> Generator[None]:
    """Every submodule in evaluation mode, each restored to its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
