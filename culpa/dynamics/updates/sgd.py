"""``torch.optim.SGD`` as a pure map, with its derivative in closed form.

With s = -1 if ``maximize`` else 1, weight decay l, momentum mu, dampening d and learning rate eta:

    g~       = s g + l theta
    v'       = mu v + (1 - d started) g~        started = 0 before the first momentum step, then 1
    u        = v', or g~ + mu v' with Nesterov, or g~ without momentum
    theta'   = theta - eta u

torch sets v' = g~, without dampening, where ``momentum_buffer`` does not exist yet. That is the
line above with v = 0 and started = 0, so "the buffer exists" becomes an ordinary coordinate of the
state, in which the update is affine. Removing the first update changes it by one, whatever follows:
the column of ``started`` is v'(started = 1) - v'(started = 0) = -d g~. The map is bilinear in
``started`` and theta, so with dampening a linear sweep leaves out d (H + l) D for the first update
(6 % of its effect on a quadratic problem); the block form, which applies the map itself, is exact.
``started`` is read from the existence of the buffer; a slot of that name (0-dim,
see ``extend``) overrides it, for states that no run had, such as a counterfactual one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from culpa.dynamics.updates.rule import TensorSlots

SOURCE = (
    "torch.optim.SGD; Sutskever, Martens, Dahl, Hinton, On the importance of initialization and "
    "momentum in deep learning, ICML 2013"
)


def _effective(param: Tensor, grad: Tensor, hyper: Mapping[str, Any]) -> Tensor:
    """g~: the gradient with its sign and weight decay."""
    signed = -grad if hyper.get("maximize", False) else grad
    decay = float(hyper["weight_decay"])
    return torch.add(signed, param, alpha=decay) if decay else signed


def _share(slots: TensorSlots, dampening: float) -> float:
    """1 - d started: what of g~ enters the momentum."""
    if "started" in slots:
        return 1.0 - dampening * float(slots["started"])
    return 1.0 - dampening if "momentum_buffer" in slots else 1.0


def step(
    param: Tensor, grad: Tensor, slots: TensorSlots, hyper: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """One update.

    Args:
        param: theta_k, any shape, real.
        grad: the gradient that torch saw (after clipping and unscaling), the same shape.
        slots: ``momentum_buffer`` and, optionally, ``started``.
        hyper: torch's param group: lr, momentum, dampening, weight_decay, nesterov, maximize.

    Returns:
        theta_{k+1} - theta_k, itself and not as a difference, and the new slots.
    """
    rate, momentum = float(hyper["lr"]), float(hyper["momentum"])
    effective = _effective(param, grad, hyper)
    new_slots = dict(slots)
    if momentum == 0:
        return -rate * effective, new_slots
    share = _share(slots, float(hyper["dampening"]))
    velocity = effective if share == 1.0 else share * effective
    if "momentum_buffer" in slots:
        velocity = torch.add(velocity, slots["momentum_buffer"], alpha=momentum)
    new_slots["momentum_buffer"] = velocity
    if "started" in slots:
        new_slots["started"] = torch.ones_like(slots["started"])
    direction = velocity
    if hyper["nesterov"]:
        direction = torch.add(effective, velocity, alpha=momentum)
    return -rate * direction, new_slots


@dataclass(frozen=True)
class _Linearised:
    """The derivative of one SGD update: constants, but for the column of ``started``.

    theta' = theta - eta u, u = direct g~ + carried v', v' = mu v + share g~, g~ = s g + l theta.
    """

    effective: Tensor
    rate: float
    momentum: float
    dampening: float
    share: float
    decay: float
    sign: float
    direct: float
    carried: float

    def pullback(
        self, cotangent: Tensor, slots: TensorSlots
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """See ``Linearised``; costs 2 passes over the parameter, 3 more with dampening."""
        before = dict(slots)
        if self.momentum == 0:
            gradient = -self.rate * cotangent
        else:
            along = -self.rate * self.carried
            if "momentum_buffer" in slots:
                velocity = torch.add(slots["momentum_buffer"], cotangent, alpha=along)
            else:
                velocity = along * cotangent
            gradient = velocity if self.share == 1.0 else self.share * velocity
            if self.direct:
                gradient = torch.add(gradient, cotangent, alpha=-self.rate * self.direct)
            before["momentum_buffer"] = self.momentum * velocity
            # started_{k+1} is 1 whatever came before: its cotangent ends here.
            before.pop("started", None)
            if self.dampening:
                inner = (self.effective * velocity).sum()
                before["started"] = -self.dampening * inner
        theta = torch.add(cotangent, gradient, alpha=self.decay) if self.decay else cotangent
        return theta, before, gradient if self.sign > 0 else -gradient

    def pushforward(
        self, tangent: Tensor, slots: TensorSlots, grad: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Linearised``: the transpose of ``pullback``."""
        after = dict(slots)
        effective = grad if self.sign > 0 else -grad
        if self.decay:
            effective = torch.add(effective, tangent, alpha=self.decay)
        if self.momentum == 0:
            return torch.add(tangent, effective, alpha=-self.rate), after
        velocity = effective if self.share == 1.0 else self.share * effective
        if "momentum_buffer" in slots:
            velocity = torch.add(velocity, slots["momentum_buffer"], alpha=self.momentum)
        started = after.pop("started", None)
        if started is not None and self.dampening:
            velocity = velocity - self.dampening * started * self.effective
        after["momentum_buffer"] = velocity
        theta = torch.add(tangent, velocity, alpha=-self.rate * self.carried)
        if self.direct:
            theta = torch.add(theta, effective, alpha=-self.rate * self.direct)
        return theta, after


def linearise(
    param: Tensor, grad: Tensor, slots: TensorSlots, hyper: Mapping[str, Any]
) -> _Linearised:
    """The derivative of ``step`` (same arguments) with respect to theta, slots and gradient."""
    momentum, dampening = float(hyper["momentum"]), float(hyper["dampening"])
    nesterov = bool(hyper["nesterov"])
    return _Linearised(
        effective=_effective(param, grad, hyper),
        rate=float(hyper["lr"]),
        momentum=momentum,
        dampening=dampening,
        share=_share(slots, dampening),
        decay=float(hyper["weight_decay"]),
        sign=-1.0 if hyper.get("maximize", False) else 1.0,
        direct=1.0 if nesterov else 0.0,
        carried=momentum if nesterov else 1.0,
    )


def extend(param: Tensor, slots: TensorSlots, hyper: Mapping[str, Any]) -> dict[str, Tensor]:
    """``slots`` with ``started`` = 1 where torch keeps a momentum buffer (absent: 0).

    Without dampening nothing depends on it, and it is left out.
    """
    extended = dict(slots)
    if "momentum_buffer" in slots and float(hyper["dampening"]):
        extended.setdefault("started", slots["momentum_buffer"].new_ones(()))
    return extended


def affine(hyper: Mapping[str, Any]) -> bool:
    """Whether ``started`` plays no part: then differences of states move as the derivative says."""
    return float(hyper["momentum"]) == 0 or float(hyper["dampening"]) == 0


def singular(
    param: Tensor,
    grad: Tensor,
    slots: TensorSlots,
    hyper: Mapping[str, Any],
    new_slots: TensorSlots,
) -> int:
    """0: the update is affine in the state and the gradient."""
    return 0
