"""``torch.optim.Adam`` and ``torch.optim.AdamW`` as one pure map, with its derivative.

With s = -1 if ``maximize`` else 1, weight decay l (coupled in Adam, decoupled in AdamW), t = step
before the update, c1 = 1 - beta1^(t+1) and c2 = 1 - beta2^(t+1):

    g~     = s g + l theta   (coupled; s g if decoupled)
    m'     = beta1 m + (1 - beta1) g~
    v'     = beta2 v + (1 - beta2) g~^2
    w      = v', or max(v_max, v') with amsgrad, where v_max' = w
    theta' = theta - lr / c1  m' / (sqrt(w / c2) + eps)  - lr l theta (decoupled only)

Two conventions make the derivative finite and useful.

* d sqrt(w) / d w at w = 0 (an input that never fired) is infinite; it is DEFINED AS 0 here, in
  autograd through ``step`` as well, and ``singular`` counts the coordinates concerned. sqrt(w) of a
  negative w, which only a displaced state can have, is 0 in the same way.
* The step counter is an integer that removing one update lowers by exactly one, so its column is
  the backward difference theta'(t) - theta'(t - 1), computed without cancellation. At t = 0 there
  is no earlier update to remove and the column is 0.

At exact ties v' = v_max the derivative of the maximum is shared in halves, as autograd does it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from culpa.dynamics.updates.rule import TensorSlots

SOURCE_ADAM = (
    "torch.optim.Adam; Kingma, Ba, Adam: a method for stochastic optimization, arXiv 1412.6980; "
    "amsgrad: Reddi, Kale, Kumar, On the convergence of Adam and beyond, arXiv 1904.09237"
)
SOURCE_ADAMW = (
    "torch.optim.AdamW; Loshchilov, Hutter, Decoupled weight decay regularization, "
    "arXiv 1711.05101; amsgrad: Reddi, Kale, Kumar, arXiv 1904.09237"
)


class _Settings(NamedTuple):
    """The param group as numbers."""

    rate: float
    beta1: float
    beta2: float
    eps: float
    coupled: float  # weight decay that enters the gradient
    decoupled: float  # weight decay that acts on the parameter
    sign: float
    amsgrad: bool


def _settings(hyper: Mapping[str, Any]) -> _Settings:
    beta1, beta2 = hyper["betas"]
    decay = float(hyper["weight_decay"])
    decoupled = bool(hyper.get("decoupled_weight_decay", False))
    return _Settings(
        rate=float(hyper["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(hyper["eps"]),
        coupled=0.0 if decoupled else decay,
        decoupled=decay if decoupled else 0.0,
        sign=-1.0 if hyper.get("maximize", False) else 1.0,
        amsgrad=bool(hyper["amsgrad"]),
    )


class _Moments(NamedTuple):
    """What an update computes before it moves the parameter."""

    effective: Tensor  # g~
    first: Tensor  # m'
    second: Tensor  # v'
    largest: Tensor  # v_max before the update; v' without amsgrad
    used: Tensor  # w
    positive: Tensor | None  # 1 where w > 0, else 0; None where that is everywhere
    safe_root: Tensor  # sqrt(w), but 1 where w = 0
    root: Tensor  # sqrt(w)


def _slot(slots: TensorSlots, slot: str, like: Tensor) -> Tensor:
    return slots[slot] if slot in slots else torch.zeros_like(like)


def _moments(param: Tensor, grad: Tensor, slots: TensorSlots, at: _Settings) -> _Moments:
    effective = grad if at.sign > 0 else -grad
    if at.coupled:
        effective = torch.add(effective, param, alpha=at.coupled)
    first = torch.lerp(_slot(slots, "exp_avg", grad), effective, 1 - at.beta1)
    second = at.beta2 * _slot(slots, "exp_avg_sq", grad)
    second = torch.addcmul(second, effective, effective, value=1 - at.beta2)
    largest = _slot(slots, "max_exp_avg_sq", grad) if at.amsgrad else second
    used = torch.maximum(largest, second) if at.amsgrad else second
    positive, safe_root, root = _root(used)
    return _Moments(effective, first, second, largest, used, positive, safe_root, root)


def _root(used: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """Of ``_Moments``: ``positive``, ``safe_root`` and ``root``."""
    # To look costs a pass, and an accelerator would have to be waited for.
    if used.is_cpu and used.numel() and bool(used.amin() > 0):
        root = used.sqrt()
        return None, root, root
    # Taking the root of 1 where w = 0 and multiplying by 0 afterwards keeps the infinite derivative
    # from arising. These are where(w > 0, w, 1) and w > 0, at a fraction of their time.
    safe_root = torch.threshold(used, 0.0, 1.0).sqrt()
    positive = used.sign().clamp(min=0)
    return positive, safe_root, positive * safe_root


def _corrections(at: _Settings, count: float) -> tuple[float, float]:
    """(lr / c1, 1 / sqrt(c2)) for the update that makes the step counter ``count`` >= 1."""
    return at.rate / (1 - at.beta1**count), 1 / math.sqrt(1 - at.beta2**count)


def _count(slots: TensorSlots) -> float:
    return float(slots["step"]) if "step" in slots else 0.0


def step(
    param: Tensor, grad: Tensor, slots: TensorSlots, hyper: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """One update.

    Args:
        param: theta_k, any shape, real.
        grad: the gradient that torch saw (after clipping and unscaling), the same shape.
        slots: ``step`` (0-dim, the number of updates before this one), ``exp_avg``,
            ``exp_avg_sq``, with amsgrad ``max_exp_avg_sq``; absent ones are zero.
        hyper: torch's param group: lr, betas, eps, weight_decay, amsgrad, maximize,
            decoupled_weight_decay.

    Returns:
        theta_{k+1} - theta_k, itself and not as a difference, and the new slots.
    """
    at = _settings(hyper)
    moments = _moments(param, grad, slots, at)
    step_size, scale = _corrections(at, _count(slots) + 1)
    increment = -step_size * (moments.first / (scale * moments.root + at.eps))
    if at.decoupled:
        increment = torch.add(increment, param, alpha=-at.rate * at.decoupled)
    new_slots = dict(slots)
    new_slots["step"] = slots["step"] + 1 if "step" in slots else torch.ones(())
    new_slots["exp_avg"] = moments.first
    new_slots["exp_avg_sq"] = moments.second
    if at.amsgrad:
        new_slots["max_exp_avg_sq"] = moments.used
    return increment, new_slots


@dataclass(frozen=True)
class _Linearised:
    """The derivative of one Adam update, as coefficients by coordinate.

    d increment = -step_size inverse dm' + of_used by_used dw - rate decoupled dtheta
                  + by_step dstep,
    dw = share dv' + (1 - share) dv_max.
    """

    at: _Settings
    step_size: float  # lr / c1
    effective: Tensor  # g~
    inverse: Tensor  # 1 / (sqrt(w / c2) + eps)
    of_used: float
    by_used: Tensor
    by_step: Tensor | None  # None at t = 0
    share: Tensor | None  # None without amsgrad

    def pullback(
        self, cotangent: Tensor, slots: TensorSlots
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """See ``Linearised``; 8 passes over the parameter after the shared coefficients."""
        at, before = self.at, dict(slots)
        first, second = _slot(slots, "exp_avg", cotangent), _slot(slots, "exp_avg_sq", cotangent)
        first = torch.addcmul(first, cotangent, self.inverse, value=-self.step_size)
        if self.share is not None:
            used = _slot(slots, "max_exp_avg_sq", cotangent)
            used = torch.addcmul(used, cotangent, self.by_used, value=self.of_used)
            before["max_exp_avg_sq"] = (1 - self.share) * used
            second = torch.addcmul(second, self.share, used)
        else:
            second = torch.addcmul(second, cotangent, self.by_used, value=self.of_used)
        # In the memory of first and second, which nobody else has.
        before["exp_avg"] = at.beta1 * first
        gradient = first.mul_(1 - at.beta1)
        gradient.addcmul_(self.effective, second, value=2 * (1 - at.beta2))
        before["exp_avg_sq"] = second.mul_(at.beta2)
        if self.by_step is not None:
            column = torch.dot(self.by_step.reshape(-1), cotangent.reshape(-1))
            before["step"] = column + slots["step"] if "step" in slots else column
        theta = cotangent * (1 - at.rate * at.decoupled) if at.decoupled else cotangent
        if at.coupled:
            theta = torch.add(theta, gradient, alpha=at.coupled)
        return theta, before, gradient if at.sign > 0 else -gradient

    def pushforward(
        self, tangent: Tensor, slots: TensorSlots, grad: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Linearised``: the transpose of ``pullback``."""
        at, after = self.at, dict(slots)
        effective = grad if at.sign > 0 else -grad
        if at.coupled:
            effective = torch.add(effective, tangent, alpha=at.coupled)
        first = torch.lerp(_slot(slots, "exp_avg", grad), effective, 1 - at.beta1)
        second = at.beta2 * _slot(slots, "exp_avg_sq", grad)
        second = torch.addcmul(second, self.effective, effective, value=2 * (1 - at.beta2))
        used = second
        if self.share is not None:
            used = torch.lerp(_slot(slots, "max_exp_avg_sq", grad), second, self.share)
            after["max_exp_avg_sq"] = used
        after["exp_avg"], after["exp_avg_sq"] = first, second
        theta = tangent * (1 - at.rate * at.decoupled) if at.decoupled else tangent
        theta = torch.addcmul(theta, first, self.inverse, value=-self.step_size)
        theta = torch.addcmul(theta, used, self.by_used, value=self.of_used)
        if "step" in slots and self.by_step is not None:
            theta = theta + self.by_step * slots["step"]
        return theta, after


def linearise(
    param: Tensor, grad: Tensor, slots: TensorSlots, hyper: Mapping[str, Any]
) -> _Linearised:
    """The derivative of ``step`` (same arguments) with respect to theta, slots and gradient."""
    at, count = _settings(hyper), _count(slots)
    moments = _moments(param, grad, slots, at)
    step_size, scale = _corrections(at, count + 1)
    inverse = (scale * moments.root).add_(at.eps).reciprocal_()
    forward = moments.first * inverse
    # -step_size m' d(inverse) / dw = step_size scale / 2  (m' inverse) inverse / sqrt(w), and
    # m' inverse is of order one, so that nothing overflows in float32.
    by_used = (forward * inverse).div_(moments.safe_root)
    if moments.positive is not None:
        by_used.mul_(moments.positive)
    return _Linearised(
        at=at,
        step_size=step_size,
        effective=moments.effective,
        inverse=inverse,
        of_used=0.5 * step_size * scale,
        by_used=by_used,
        by_step=_backward_difference(moments, forward, at, count) if count >= 1 else None,
        # Where v' is the larger 1, at ties 1/2, else 0.
        share=(moments.second - moments.largest).sign().add(1).mul(0.5) if at.amsgrad else None,
    )


def _backward_difference(moments: _Moments, forward: Tensor, at: _Settings, count: float) -> Tensor:
    """theta'(t) - theta'(t - 1) by coordinate, t = ``count`` >= 1; ``forward`` is m' / D.

    With a, b the step sizes, D = s r + eps, E = s' r + eps the denominators and r = sqrt(w), now
    and at t - 1:  -m' (a / D - b / E) = m' / D (b D - a E) / E, and (b D - a E) / E is
    (b s / s' - a) + eps b (1 - s / s') / E: what nearly cancels are float64 numbers, not tensors.
    """
    now, scale = _corrections(at, count + 1)
    then, scale_then = _corrections(at, count)
    ratio = scale / scale_then
    denominator = (moments.root * scale_then).add_(at.eps)
    constant = forward * (then * ratio - now)
    return constant.addcdiv_(forward, denominator, value=at.eps * then * (1.0 - ratio))


def extend(param: Tensor, slots: TensorSlots, hyper: Mapping[str, Any]) -> dict[str, Tensor]:
    """``slots`` with ``step``, which torch keeps on the CPU, beside the moments: nothing to add."""
    extended = dict(slots)
    if "step" in slots:
        extended["step"] = slots["step"].to(param.device)
    return extended


def singular(
    param: Tensor,
    grad: Tensor,
    slots: TensorSlots,
    hyper: Mapping[str, Any],
    new_slots: TensorSlots,
) -> int:
    """Coordinates whose second moment w is 0 (or less), where d sqrt(w) / d w was defined as 0."""
    used = new_slots.get("max_exp_avg_sq", new_slots["exp_avg_sq"])
    if used.numel() and bool(used.amin() > 0):  # half the time, and so it nearly always is
        return 0
    return int((used <= 0).sum())
