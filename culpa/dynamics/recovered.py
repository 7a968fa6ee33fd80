"""The gradient of an update from the states around it: no forward pass, no backward pass.

An optimizer with a moment keeps its gradient there. With g~ = s g + l theta (s = -1 if ``maximize``
else 1, l the weight decay that enters the gradient) and as in updates/sgd.py and updates/adam.py:

    SGD:          v' = mu v + share g~            ->  g~ = (v' - mu v) / share
    Adam, AdamW:  m' = beta1 m + (1 - beta1) g~   ->  g~ = (m' - beta1 m) / (1 - beta1)

and g = s (g~ - l theta). That is the gradient as the optimizer saw it, so ``recovered`` has nothing
to say where clipping changed it, without a moment (theta' - theta has lost the small digits), in
half precision, and where so much cancels that rounding would be more than ``ROUNDING`` of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from culpa import tree
from culpa.trajectory.schema import Group, StepRecord
from culpa.trajectory.state import State
from culpa.tree import Tree

ROUNDING = 1e-5
"""Relative; a gradient differs by 1e-6 from itself if its sums are done in another order."""
INSIDE = 1e-3
"""So far below the bound of clipping, relatively, that it cannot have been what clipping left."""


def recovered(record: StepRecord, before: State, after: State) -> Tree | None:
    """The gradient of an update, by name, or ``None`` where the states do not tell it.

    Args:
        record: the update.
        before, after: the states around it, ``before`` after a reset of the optimizer if any.

    Returns:
        What ``backward`` left, before clipping, of every held parameter that had a gradient. Cost:
        a few passes over the parameters.
    """
    found: Tree = {}
    effective: Tree = {}
    made: Tree = {}
    least = 1.0
    for group in record.groups:
        for name in group.names:
            if name in record.without_gradient:
                continue
            parts = _moments(group, name, before, after)
            if parts is None:
                return None
            made[name], moment, kept, share = parts
            least = min(least, abs(share))
            effective[name] = (
                made[name] if moment is None else torch.sub(made[name], moment, alpha=kept)
            )
            if share != 1.0:
                effective[name] = effective[name] / share
            found[name] = _raw(group, effective[name], before.params[name])
    size = tree.norm(effective)
    eps = max((torch.finfo(value.dtype).eps for value in found.values()), default=0.0)
    # What was carried over is at most the sum of the other two.
    rounding = eps * (2.0 * tree.norm(made) / least + size)
    if not rounding <= ROUNDING * size or not _unclipped(record, found):
        return None
    return found


def _moments(
    group: Group, name: str, before: State, after: State
) -> tuple[Tensor, Tensor | None, float, float] | None:
    """m', m if there was one, its factor in m' and that of g~; ``None`` if not known."""
    hyper = group.hyper
    param = before.params[name]
    if param.dtype not in (torch.float32, torch.float64):
        return None
    if group.optimizer == "SGD":
        slot, kept = "momentum_buffer", float(hyper["momentum"])
        held = name in before.slots.get(slot, {})
        share = 1.0 - float(hyper["dampening"]) if held else 1.0
        if kept == 0.0:
            return None
    elif group.optimizer in ("Adam", "AdamW"):
        slot, kept = "exp_avg", float(hyper["betas"][0])
        share = 1.0 - kept
    else:
        return None
    made = after.slots.get(slot, {}).get(name)
    if made is None or share == 0.0 or made.dtype != param.dtype:
        return None
    return made, before.slots.get(slot, {}).get(name), kept, share


def _raw(group: Group, effective: Tensor, param: Tensor) -> Tensor:
    """g of g~."""
    hyper = group.hyper
    decoupled = hyper.get("decoupled_weight_decay", group.optimizer == "AdamW")
    decay = 0.0 if decoupled else float(hyper["weight_decay"])
    signed = torch.sub(effective, param, alpha=decay) if decay else effective
    return -signed if hyper.get("maximize", False) else signed


def _unclipped(record: StepRecord, found: Tree) -> bool:
    """Whether the gradient that was applied cannot have been clipped."""
    if record.clip_grad_value is not None:
        largest = max((float(g.abs().max()) for g in found.values() if g.numel()), default=0.0)
        return largest < record.clip_grad_value * (1.0 - INSIDE)
    if record.clip_grad_norm is not None:
        return tree.norm(found) < record.clip_grad_norm * (1.0 - INSIDE)
    return True
