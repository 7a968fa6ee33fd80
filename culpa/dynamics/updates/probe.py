"""Whether an optimizer's step has a derivative worth propagating: a cheap experiment, in float64.

Four updates of a small matrix with random gradients. The step under ``Through`` must do what the
step does by itself, its derivative must be the difference quotient's, and a gradient must have an
infinitesimal effect if it has a finite one: the sign of a gradient has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from culpa.dynamics.updates.generic import GRADIENT, THETA, linearise, run
from culpa.dynamics.updates.through import Through

_SHAPE = (6, 4)
_WARM_UP = 2
_STEP = 1e-5
_SAME, _SAME_ROUNDED, _SLOPE = 1e-9, 0.1, 1e-4
"""Relative gaps allowed: of the steps; where a cast to half precision was left out; of slopes."""

Outcome = dict[str, Tensor]


def why_not(found: type[Optimizer], hyper: Mapping[str, Any]) -> str:
    """Why the step of a class has no useful derivative; empty if it has one."""
    if not hyper.get("lr", 1.0):
        hyper = {**hyper, "lr": 1e-2}  # a schedule that begins at zero
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(_SHAPE, generator=generator, dtype=torch.float64)

    state = {THETA: normal()}
    for _ in range(_WARM_UP):
        state = _step(found, state, normal(), hyper)
    grad = normal()
    try:
        through = Through(recording=False)
        same = _distance(_step(found, state, grad, hyper, through), state, found, grad, hyper)
        slopes = _slope_gap(found, state, grad, hyper, generator)
        effect = _effect(found, state, [grad, normal(), normal()], hyper, normal())
    except Exception as error:  # noqa: BLE001 (a stranger's step may raise anything: it is said)
        return f"autograd cannot follow its step ({' '.join(str(error).split())[:200]})"
    if not same <= (_SAME_ROUNDED if through.rounded else _SAME):
        return f"its step under autograd differs from its step by {same:.1g} of the change it makes"
    if not slopes <= _SLOPE:
        return (
            f"the derivative that autograd takes of its step is {slopes:.1g} off the difference"
            " quotient, so numbers pass outside of torch (float(), NumPy) or it is discontinuous"
        )
    flipped = _step(found, state, -grad, hyper)[THETA] - _step(found, state, grad, hyper)[THETA]
    if effect == 0.0 and bool((flipped != 0).any()):
        return (
            "its step depends on gradients through their signs only, so the derivative is zero"
            " wherever it exists while effects are not"
        )
    return ""


def _step(
    found: type[Optimizer],
    state: Outcome,
    grad: Tensor,
    hyper: Mapping[str, Any],
    through: Through | None = None,
) -> Outcome:
    slots = {s: v for s, v in state.items() if s != THETA}
    return {n: v.detach() for n, v in run(found, state[THETA], grad, slots, hyper, through).items()}


def _size(values: Outcome) -> float:
    return float(torch.stack([v.double().square().sum() for v in values.values()]).sum().sqrt())


def _difference(a: Outcome, b: Outcome, scale: float = 1.0) -> Outcome:
    return {n: (a[n].double() - b[n].double()) * scale for n in a}


def _distance(
    modelled: Outcome,
    state: Outcome,
    found: type[Optimizer],
    grad: Tensor,
    hyper: Mapping[str, Any],
) -> float:
    """How far a step is from the class's own, relative to the change that makes."""
    own = _step(found, state, grad, hyper)
    change = _size(_difference({n: own[n] for n in state}, state))
    return _size(_difference(modelled, own)) / change if change > 0.0 else float("nan")


def _slope_gap(
    found: type[Optimizer],
    state: Outcome,
    grad: Tensor,
    hyper: Mapping[str, Any],
    generator: torch.Generator,
) -> float:
    """Pushforward against the central difference along a random direction."""
    slots = {s: v for s, v in state.items() if s != THETA}
    linear = linearise(found, state[THETA], grad, slots, hyper)
    inputs = {**state, GRADIENT: grad}
    along = {
        n: v * torch.randn(v.shape, generator=generator, dtype=v.dtype)
        for n, v in inputs.items()
        if v.ndim > 0 and v.is_floating_point()
    }
    moved: list[Outcome] = []
    for sign in (1.0, -1.0):
        there = {n: v + sign * _STEP * along[n] if n in along else v for n, v in inputs.items()}
        at = there.pop(GRADIENT)
        moved.append(_step(found, there, at, hyper, Through(recording=False)))
    quotient = _difference(moved[0], moved[1], 0.5 / _STEP)
    tangents = {n: v for n, v in along.items() if n not in (THETA, GRADIENT)}
    theta, after = linear.pushforward(along[THETA], tangents, along[GRADIENT])
    slope = {n: after.get(n, torch.zeros_like(v)) for n, v in quotient.items() if n != THETA}
    slope[THETA] = theta
    size = _size(quotient)
    return _size(_difference(slope, quotient)) / size if size > 0.0 else float("nan")


def _effect(
    found: type[Optimizer],
    state: Outcome,
    grads: list[Tensor],
    hyper: Mapping[str, Any],
    direction: Tensor,
) -> float:
    """The size of d theta, some updates later, when the first gradient moves along a direction."""
    theta, slots = torch.zeros_like(state[THETA]), dict[str, Tensor]()
    for at, grad in enumerate(grads):
        before = {s: v for s, v in state.items() if s != THETA}
        linear = linearise(found, state[THETA], grad, before, hyper)
        moving = direction if at == 0 else torch.zeros_like(direction)
        theta, slots = linear.pushforward(theta, slots, moving)
        state = _step(found, state, grad, hyper)
    return float(theta.norm())
