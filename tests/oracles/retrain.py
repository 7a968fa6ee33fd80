"""Skip-and-retrain: the truth every estimate is held against, as plain torch loops.

A ``Plan`` is a training run written down: how to build the model and its optimizers, the batch and
the learning rates of every update. ``retrain`` executes it with a set of updates removed, in one of
the three counterfactual senses:

``skip``           nothing happens at a removed update; later ones keep their recorded rates;
``restart``        as ``skip``, and the first executed update after a removed one starts from a
                   freshly built optimizer;
``zero-gradient``  the gradients are zero tensors and ``optimizer.step()`` is called.

Nothing of the library is imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Batch = Any
Loss = Callable[[nn.Module, Batch], Tensor]
Counterfactual = Literal["skip", "restart", "zero-gradient"]


@dataclass(frozen=True)
class Plan:
    """A training run, written down.

    ``optimizers[k]`` builds the optimizer used from update ``k`` on (key 0 is required);
    ``rates[k]`` holds one learning rate per parameter group of update ``k``;
    ``options[k]`` are hyperparameters that the loop writes into all groups from update ``k`` on;
    ``stages`` are ``(name, start, stop)``, updates ``[start, stop)``.
    """

    model: Callable[[], nn.Module]
    loss: Loss
    optimizers: Mapping[int, Callable[[nn.Module], Optimizer]]
    batches: Sequence[Batch]
    rates: Sequence[Sequence[float]]
    stages: Sequence[tuple[str, int, int]]
    example_losses: Loss | None = None
    clip_grad_norm: float | None = None
    options: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert 0 in self.optimizers
        assert len(self.rates) == len(self.batches) == self.stages[-1][2]

    @property
    def num_steps(self) -> int:
        """K, the number of updates."""
        return len(self.batches)

    def updates(self, stage: str) -> range:
        """The updates of a stage."""
        return {name: range(start, stop) for name, start, stop in self.stages}[stage]


@dataclass(frozen=True)
class Outcome:
    """Where a run ended, and (``path[k]``) the parameters before update k, ``path[K]`` the last."""

    model: nn.Module
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    optimizer_state: dict[str, Any]
    path: list[dict[str, Tensor]]


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Detached copies of the parameters by name."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """Detached copies of the buffers by name."""
    return {name: value.detach().clone() for name, value in model.named_buffers()}


def set_groups(plan: Plan, k: int, optimizer: Optimizer) -> None:
    """Write the learning rates of update k, and the options in force at it, into the groups."""
    for group, rate in zip(optimizer.param_groups, plan.rates[k], strict=True):
        group["lr"] = rate
        for start in sorted(plan.options):
            if start <= k:
                group.update(plan.options[start])


def retrain(
    plan: Plan,
    without: Collection[int] = (),
    counterfactual: Counterfactual = "skip",
    *,
    drop: Mapping[int, Collection[int]] | None = None,
    keep_path: bool = False,
) -> Outcome:
    """Execute ``plan`` with the updates in ``without`` removed.

    ``drop[k]`` are rows of update k's batch whose term ``loss_i / B`` is taken out of its loss
    (needs ``plan.example_losses``; the mean keeps its denominator B).
    """
    removed = frozenset(without)
    assert removed <= set(range(plan.num_steps))
    drop = drop or {}
    model = plan.model()
    build = plan.optimizers[0]
    optimizer = build(model)
    stale = False  # whether the optimizer has to be replaced before the next executed update
    path = [parameters_of(model)] if keep_path else []
    for k, batch in enumerate(plan.batches):
        if k in plan.optimizers:
            build = plan.optimizers[k]
            optimizer, stale = build(model), False
        if k in removed and counterfactual != "zero-gradient":
            stale = counterfactual == "restart"
        else:
            if stale:
                optimizer, stale = build(model), False
            set_groups(plan, k, optimizer)
            optimizer.zero_grad()
            if k in removed:
                for parameter in model.parameters():
                    parameter.grad = torch.zeros_like(parameter)
            elif k in drop:
                assert plan.example_losses is not None
                losses = plan.example_losses(model, batch)
                keep = torch.ones_like(losses)
                keep[sorted(drop[k])] = 0
                ((losses * keep).sum() / len(losses)).backward()
            else:
                plan.loss(model, batch).backward()
            if plan.clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), plan.clip_grad_norm)
            optimizer.step()
        if keep_path:
            path.append(parameters_of(model))
    return Outcome(
        model, parameters_of(model), buffers_of(model), dict(optimizer.state_dict()), path
    )


@torch.no_grad()
def behaviour_values(
    model: nn.Module, function: Callable[[nn.Module, Batch], Tensor], batch: Batch
) -> Tensor:
    """``function(model, batch)`` in evaluation mode, as float64; the model's mode is put back."""
    training = model.training
    model.eval()
    values = function(model, batch).double()
    model.train(training)
    return values


def true_effects(
    plan: Plan,
    removals: Sequence[Collection[int]],
    function: Callable[[nn.Module, Batch], Tensor],
    batch: Batch,
    counterfactual: Counterfactual = "skip",
) -> Tensor:
    """gamma(theta_K) - gamma(theta_K without S) for every S in ``removals``: ``[len, n]``."""
    whole = behaviour_values(retrain(plan).model, function, batch)
    rows = [
        whole - behaviour_values(retrain(plan, s, counterfactual).model, function, batch)
        for s in removals
    ]
    return torch.stack(rows)
