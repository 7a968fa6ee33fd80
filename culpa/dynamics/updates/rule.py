"""What an optimizer has to provide to be differentiated: a pure step and its linearisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

TensorSlots = Mapping[str, Tensor]
"""The slots of one parameter: slot name -> tensor. A slot that is absent is zero."""


@runtime_checkable
class Linearised(Protocol):
    """The derivative of one parameter's update at one observed state.

    The map is (theta_k, slots_k, grad_k) -> (theta_{k+1}, slots_{k+1}) with
    theta_{k+1} = theta_k + increment; its identity part is included. Coefficients are computed
    once and shared by any number of calls. Slots that the update leaves alone pass through.
    """

    def pullback(
        self, cotangent: Tensor, slots: TensorSlots
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Cotangents of (theta_{k+1}, slots_{k+1}) -> cotangents of (theta_k, slots_k, grad_k)."""
        ...

    def pushforward(
        self, tangent: Tensor, slots: TensorSlots, grad: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Tangents of (theta_k, slots_k, grad_k) -> tangents of (theta_{k+1}, slots_{k+1})."""
        ...


Step = Callable[[Tensor, Tensor, TensorSlots, Mapping[str, Any]], tuple[Tensor, dict[str, Tensor]]]
"""(param, grad, slots, hyper) -> (increment, new slots)."""
Linearise = Callable[[Tensor, Tensor, TensorSlots, Mapping[str, Any]], Linearised]
"""(param, grad, slots, hyper) -> the derivative of the step there."""
Extend = Callable[[Tensor, TensorSlots, Mapping[str, Any]], dict[str, Tensor]]
"""(param, slots, hyper) -> slots with what the class keeps only as "the slot exists or not"."""
Singular = Callable[[Tensor, Tensor, TensorSlots, Mapping[str, Any], TensorSlots], int]
"""(param, grad, slots, hyper, new slots) -> coordinates whose derivative is a definition."""


def always(hyper: Mapping[str, Any]) -> str:
    """Nothing speaks against the derivative of a closed form."""
    return ""


def never(hyper: Mapping[str, Any]) -> bool:
    """Most optimizers are not affine."""
    return False


@dataclass(frozen=True)
class Rule:
    """One optimizer as mathematics.

    Attributes:
        name: the class's name as a record has it: bare for those of ``torch.optim``.
        step: the update of one parameter.
        linearise: its derivative at one observed state.
        extend: adds to the slots of one parameter the coordinates that torch keeps only as "the
            slot exists or does not"; displacements of the state are differences of extended slots.
        singular: how many coordinates of an update have a derivative by definition only.
        source: where the recurrence comes from, for the report.
        defaults: hyperparameters that the class implies where a param group does not name them.
        why_not: at given hyperparameters, why the step has no useful derivative; empty if it has.
        affine: whether, at given hyperparameters, the update is affine in state and gradient; a
            difference of two states then moves by the derivative exactly, however large it is.
    """

    name: str
    step: Step
    linearise: Linearise
    extend: Extend
    singular: Singular
    source: str
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    why_not: Callable[[Mapping[str, Any]], str] = always
    affine: Callable[[Mapping[str, Any]], bool] = never
