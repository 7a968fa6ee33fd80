"""torch's own arithmetic of SGD, Adam and AdamW, in place: of several states in one tensor each.

It is elementwise, so that tensors may have a first dimension of states; what an optimizer counts
must be the same in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.sgd import sgd

Moments = Mapping[str, Sequence[Tensor]]
"""The slots that ``slots_of`` names, one tensor for each parameter; written into."""
Hyper = Mapping[str, Any]
"""torch's param group, with its defaults."""
_Many = list[Tensor]


def slots_of(optimizer: str, hyper: Hyper) -> tuple[str, ...]:
    """The slots that hold tensors like the parameter's."""
    if optimizer == "SGD":
        return ("momentum_buffer",) if float(hyper["momentum"]) else ()
    largest = ("max_exp_avg_sq",) if hyper["amsgrad"] else ()
    return ("exp_avg", "exp_avg_sq", *largest)


def step(
    optimizer: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Moments,
    hyper: Hyper,
    count: float,
) -> float:
    """One update of every parameter.

    Args:
        optimizer: ``"SGD"``, ``"Adam"`` or ``"AdamW"``, with its ``hyper``.
        params: written into.
        grads: like the parameters.
        moments: of a parameter that was not updated yet, whatever they hold.
        count: updates before this one, of SGD 0 or 1.

    Returns:
        What has been counted now.
    """
    return _STEPS[optimizer]([*params], [*grads], moments, hyper, count)


def _sgd(params: _Many, grads: _Many, moments: Moments, hyper: Hyper, count: float) -> float:
    held = moments.get("momentum_buffer", ())
    buffers: list[Tensor | None] = [*held] if count and held else [None] * len(params)
    numbers = {name: float(hyper[name]) for name in ("lr", "momentum", "dampening", "weight_decay")}
    signs: dict[str, Any] = {
        name: bool(hyper.get(name, False)) for name in ("nesterov", "maximize")
    }
    with torch.no_grad():
        sgd(params, grads, buffers, foreach=False, fused=False, **numbers, **signs)
        if held and not count:  # the first buffer is the gradient, whatever the dampening
            for into, made in zip(held, buffers, strict=True):
                if made is not None:
                    into.copy_(made)
    return 1.0


def _adam(params: _Many, grads: _Many, moments: Moments, hyper: Hyper, count: float) -> float:
    if not count:
        for values in moments.values():
            for value in values:
                value.zero_()
    numbers = {name: float(hyper[name]) for name in ("lr", "eps", "weight_decay")}
    betas = {f"beta{at}": float(beta) for at, beta in enumerate(hyper["betas"], 1)}
    names = ("amsgrad", "maximize", "decoupled_weight_decay")
    signs: dict[str, Any] = {name: bool(hyper.get(name, False)) for name in names}
    with torch.no_grad():
        adam(
            params,
            grads,
            [*moments["exp_avg"]],
            [*moments["exp_avg_sq"]],
            [*moments.get("max_exp_avg_sq", ())],
            [torch.tensor(count) for _ in params],
            foreach=False,
            fused=False,
            **numbers,
            **betas,
            **signs,
        )
    return count + 1.0


_STEPS: dict[str, Callable[..., float]] = {"SGD": _sgd, "Adam": _adam, "AdamW": _adam}
