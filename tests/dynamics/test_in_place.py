"""Several states in one tensor, updated at once, against torch.optim on each of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from culpa.dynamics.updates import in_place

LANES = 3
CASES: list[tuple[type[Optimizer], dict[str, Any]]] = [
    (SGD, {}),
    (SGD, {"weight_decay": 0.1, "maximize": True}),
    (SGD, {"momentum": 0.9}),
    (SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    (SGD, {"momentum": 0.8, "nesterov": True}),
    (Adam, {"weight_decay": 0.1}),
    (Adam, {"betas": (0.7, 0.9), "amsgrad": True, "maximize": True}),
    (AdamW, {"weight_decay": 0.1, "eps": 1e-3}),
]


@pytest.mark.parametrize(("optimizer", "given"), CASES)
def test_every_state_moves_as_by_an_optimizer_of_its_own(
    optimizer: type[Optimizer], given: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    stacks = [normal(LANES, 4, 2), normal(LANES, 3)]
    alone = [[stack[lane].clone().requires_grad_() for stack in stacks] for lane in range(LANES)]
    steppers = [optimizer(params, lr=0.1, **given) for params in alone]  # pyright: ignore[reportCallIssue]
    hyper, name = steppers[0].param_groups[0], optimizer.__name__
    # Whatever the slots hold at first: an optimizer that was reset leaves its old ones.
    moments = {s: [normal(*v.shape) for v in stacks] for s in in_place.slots_of(name, hyper)}
    count = 0.0
    for _ in range(4):
        grads = [normal(*stack.shape) for stack in stacks]
        for lane, (params, stepper) in enumerate(zip(alone, steppers, strict=True)):
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad[lane].clone()
            stepper.step()
        count = in_place.step(name, stacks, grads, moments, hyper, count)
    for lane, (params, stepper) in enumerate(zip(alone, steppers, strict=True)):
        for at, param in enumerate(params):
            torch.testing.assert_close(stacks[at][lane], param.detach(), rtol=1e-12, atol=1e-13)
            for slot, values in moments.items():
                kept = stepper.state[param][slot]
                torch.testing.assert_close(values[at][lane], kept, rtol=1e-12, atol=1e-13)
