"""Optimizers to try, each with its hand-written twin where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from oracles import unrolled

Factory = Callable[[nn.Module], Optimizer]

DECAYING = [(0.05 * (1 - k / 24),) for k in range(12)]
"""A schedule for twelve updates and one parameter group."""


def sgd(**options: Any) -> Factory:
    """torch.optim.SGD over all parameters."""
    return lambda model: SGD(model.parameters(), lr=0.1, **options)


def adamw(**options: Any) -> Factory:
    """torch.optim.AdamW over all parameters."""
    return lambda model: AdamW(model.parameters(), lr=0.1, **options)


def adam(**options: Any) -> Factory:
    """torch.optim.Adam over all parameters."""
    return lambda model: Adam(model.parameters(), lr=0.1, **options)


def two_groups(model: nn.Module) -> Optimizer:
    """SGD: weight decay and momentum on matrices only, another learning rate on biases."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim <= 1]
    return SGD(
        [
            {"params": matrices, "momentum": 0.9, "weight_decay": 0.1},
            {"params": biases, "momentum": 0.5},
        ],
        lr=0.1,
    )


def two_adamw_groups(model: nn.Module) -> Optimizer:
    """AdamW: weight decay on matrices only, other betas on biases."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim <= 1]
    return AdamW(
        [
            {"params": matrices, "weight_decay": 0.1},
            {"params": biases, "weight_decay": 0.0, "betas": (0.8, 0.95)},
        ],
        lr=0.1,
    )


SGDS: dict[str, Factory] = {
    "plain": sgd(),
    "decay": sgd(weight_decay=0.1),
    "momentum": sgd(momentum=0.9),
    "momentum-decay": sgd(momentum=0.9, weight_decay=0.1),
    "nesterov": sgd(momentum=0.8, nesterov=True),
    "nesterov-decay": sgd(momentum=0.8, nesterov=True, weight_decay=0.05),
    "dampening": sgd(momentum=0.9, dampening=0.3, weight_decay=0.1),
    "maximize": sgd(momentum=0.3, maximize=True, weight_decay=0.1),
    "two-groups": two_groups,
}
"""Whose updates are affine maps of (parameters, momentum) when gradients are."""


def rates_for(name: str) -> list[tuple[float, ...]]:
    """``DECAYING`` with one rate per parameter group of the recipe."""
    if name.startswith("two-"):
        return [(rate, 0.5 * rate) for (rate,) in DECAYING]
    return DECAYING


TWINS: dict[str, tuple[Factory, unrolled.Rule]] = {
    "plain": (sgd(), unrolled.SGD()),
    "momentum-decay": (
        sgd(momentum=0.9, weight_decay=0.1),
        unrolled.SGD(momentum=0.9, weight_decay=0.1),
    ),
    "dampening": (sgd(momentum=0.9, dampening=0.3), unrolled.SGD(momentum=0.9, dampening=0.3)),
    "nesterov-decay": (
        sgd(momentum=0.8, nesterov=True, weight_decay=0.05),
        unrolled.SGD(momentum=0.8, nesterov=True, weight_decay=0.05),
    ),
    "adam-decay": (
        adam(betas=(0.8, 0.95), weight_decay=0.1),
        unrolled.Adam(betas=(0.8, 0.95), weight_decay=0.1, decoupled=False),
    ),
    "adamw": (
        adamw(weight_decay=0.1, eps=1e-6),
        unrolled.Adam(weight_decay=0.1, eps=1e-6),
    ),
    "amsgrad": (
        adam(amsgrad=True, betas=(0.8, 0.6)),
        unrolled.Adam(amsgrad=True, betas=(0.8, 0.6), decoupled=False),
    ),
    "maximize": (
        adamw(maximize=True, weight_decay=0.3),
        unrolled.Adam(maximize=True, weight_decay=0.3),
    ),
    "sgd-maximize": (
        sgd(maximize=True, momentum=0.5, weight_decay=0.3),
        unrolled.SGD(maximize=True, momentum=0.5, weight_decay=0.3),
    ),
}
"""Optimizers of torch and the same recurrence written out by hand."""
