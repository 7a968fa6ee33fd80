"""Running statistics of normalisation layers: part of the state, and their derivatives.

A BatchNorm layer in training mode normalises by its batch and moves its running statistics:

    r' = (1 - f) r + f stat(theta; B),   f = momentum, or 1 / num_batches_tracked without one,

stat being the mean, and the variance with n - 1 in the denominator (torch's convention; for
InstanceNorm the mean over the batch of each instance's). torch moves them outside of autograd, so
``trace`` computes them again, differentiably, wherever a layer calls ``torch.nn.functional``: in
every micro-batch in turn, and as often as the layer is called. A layer in evaluation mode uses r
and leaves it alone; there the loss depends on r, and the gradient's derivative with respect to r is
carried too.

``num_batches_tracked`` is an integer and has no derivative; like Adam's step it stands for the
backward difference r'(count) - r'(count - 1), which is zero where there is a momentum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from culpa import tree
from culpa.dynamics.curvature.apart import Slopes, apart
from culpa.dynamics.follow import Follow
from culpa.dynamics.local import LocalLoss, reversible_twice
from culpa.dynamics.running import floating, owner_of, unknown
from culpa.problem import Function, Problem
from culpa.tree import Tree

SOURCE = "torch.nn.BatchNorm; Ioffe, Szegedy, Batch Normalization, ICML 2015"

FOLLOWED = (1e-2, 1e-5)
"""How far a running statistic may be from the one computed here: of its step, and of itself."""


@dataclass(frozen=True)
class Traced:
    """One update's forward passes: the loss, the buffers after them, and those it depended on.

    ``held`` are the buffers that the module itself moved, in the last pass; those that a kernel
    moves have the bits of training.
    """

    loss: Tensor
    buffers: Tree
    read: frozenset[str]
    held: Tree


class Pulled(NamedTuple):
    """What one pair of cotangents pulls back to, and the Hessian product if it is not in it."""

    gained: Tree
    before: Tree
    product: Tree | None


def trace(local: LocalLoss, params: Tree, buffers: Tree) -> Traced:
    """The forward passes of one update from ``params`` and ``buffers``, differentiable in both.

    ``buffers`` replace those of the observed state by name. Of an update that several ranks made
    every rank's passes begin there, and those of the first one's passes last.
    """
    start: Tree = local.transition.before.buffers | buffers
    values, ends = start, list[Tree]()
    losses: list[Tensor] = []
    read: set[str] = set()
    held: Tree = {}
    for at, (weight, batch) in enumerate(local.micro_batches()):
        if at and at % local.batches_a_rank == 0:
            ends, values = [*ends, values], start
        held = tree.clone(values)
        with Follow(held, dict(values)) as follow:
            found = local.part(params, held, batch, at)
        losses.append(weight * found)
        # Counts of batches are moved by the module itself, in place.
        moved = {n: v for n, v in held.items() if not v.is_floating_point()}
        values, read = follow.values | moved, read | follow.read
    loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
    return Traced(loss, [*ends, values][0], frozenset(read), held)


def advance(local: LocalLoss, params: Tree, buffers: Tree) -> Traced:
    """``trace`` without derivatives, for the counterfactual's own forward passes."""
    with torch.no_grad():
        return trace(local, params, buffers)


def check(local: LocalLoss, running: Sequence[str]) -> None:
    """Raise ``UnsupportedError`` unless the observed update moved the statistics as ``trace`` does.

    Cost: one forward pass.
    """
    _, moving = leaves(local, running)
    if moving:
        _check_followed(local, advance(local, local.params, {}), moving)


def evaluate(
    problem: Problem, function: Function, params: Mapping[str, Tensor], buffers: Tree, batch: Any
) -> Any:
    """``Problem.call_at`` in evaluation mode, differentiable in the running statistics too."""
    held = dict(buffers)  # nothing writes them there, and the function may read them itself
    with Follow(held, dict(buffers)):
        return problem.call_in(function, params, held, batch)


def pullback(
    local: LocalLoss,
    running: Sequence[str],
    gradients: Sequence[Tree],
    cotangents: Sequence[Tree],
    curved: Literal["", "added", "apart"] = "",
) -> list[Pulled]:
    """Cotangents w of the gradient and p of r_{k+1} -> what theta_k gains, and those of r_k.

    What theta_k gains from w, the Hessian product, is left to the propagator, unless ``curved``:
    then it is ``"added"``, for hardly more than its own cost, or given ``"apart"``, for a backward
    pass more. Otherwise: a forward pass and a backward pass for each cotangent; where the loss
    depends on r, about two and a half more.

    Raises:
        UnsupportedError: for a statistic that the observed update did not move as modelled here.
    """
    theta, moving = leaves(local, running)
    columns = _columns(local, running)
    found: list[Pulled] = []
    with torch.enable_grad(), reversible_twice():
        bent = local.graph.use(theta) if curved and local.graph is not None else None
        if bent is not None and local.graph is not None:
            traced, moving = local.graph.aside
        elif curved:
            traced, mode = apart(lambda: trace(local, theta, moving), theta)
            bent = Slopes(traced.loss, theta, mode)
        else:
            traced = trace(local, theta, moving)
        _check_followed(local, traced, moving)
        after = [traced.buffers[n] for n in moving]
        crossed = not curved and bool(traced.read & moving.keys())
        slopes = _gradients([traced.loss], theta) if crossed else {}
        for w, p in zip(gradients, cotangents, strict=True):
            weights = [_entry(p, n, v) for n, v in moving.items()]
            product: Tree | None = None
            if bent is not None:
                whole = {n: _entry(w, n, v) for n, v in theta.items()}
                pairs = list(zip(after, weights, strict=True))
                pulled = bent.pull(whole, () if curved == "apart" else pairs, moving)
                if curved == "apart":
                    product = {n: pulled[n].detach() for n in theta}
                    across = {n: pulled[n] for n in moving}
                    pulled = tree.add(bent.pull(None, pairs, moving), across)
            else:
                pulled = _gradients(after, theta | moving, weights, graph=False)
                if any(slope.requires_grad for slope in slopes.values()):
                    along = [_entry(w, n, theta[n]) for n in slopes]
                    across = _gradients(list(slopes.values()), moving, along, graph=False)
                    pulled |= {n: pulled[n] + v for n, v in across.items()}
            for count, column in columns.items():
                pulled[count] = _entry(p, count) + tree.dot(column, p)
            pulled = tree.map_values(torch.detach, pulled)
            before = {n: v for n, v in pulled.items() if n not in theta}
            found.append(Pulled({n: pulled[n] for n in theta}, before, product))
    return found


def pushforward(
    local: LocalLoss, running: Sequence[str], displacement: Tree, statistics: Tree
) -> tuple[Tree, Tree]:
    """Tangents of (theta_k, r_k) -> what the gradient gains by r_k's, and that of r_{k+1}.

    The transpose of ``pullback``: J v is the derivative of u -> J^T u applied to v, which needs no
    forward mode. Cost: about four gradients.
    """
    theta, moving = leaves(local, running)
    into = [_entry(displacement, n, v) for n, v in theta.items()]
    aside = [_entry(statistics, n, v) for n, v in moving.items()]
    with torch.enable_grad(), reversible_twice():
        traced = trace(local, theta, moving)
        _check_followed(local, traced, moving)
        after = [traced.buffers[n] for n in moving]
        probes = {n: torch.zeros_like(v, requires_grad=True) for n, v in moving.items()}
        pulled = _gradients(after, theta | moving, list(probes.values()))
        pushed = _gradients(list(pulled.values()), probes, [*into, *aside])
        gained = tree.zeros_like(theta)
        if traced.read & moving.keys():
            slopes = list(_gradients([traced.loss], moving).values())
            gained = _gradients(slopes, theta, aside)
    moved = {n: v for n, v in statistics.items() if n not in moving} | pushed
    for count, column in _columns(local, running).items():
        moved = tree.add(moved, column, float(_entry(statistics, count)))
    return tree.map_values(torch.detach, gained), tree.map_values(torch.detach, moved)


def leaves(local: LocalLoss, running: Sequence[str]) -> tuple[Tree, Tree]:
    """Parameters and running statistics of the observed state, ready to be differentiated by."""
    buffers = local.transition.before.buffers
    moving = floating({name: buffers[name] for name in running})
    theta = {name: value.detach().requires_grad_() for name, value in local.params.items()}
    return theta, {name: v.detach().clone().requires_grad_() for name, v in moving.items()}


def _gradients(
    of: Sequence[Tensor], wrt: Tree, weights: Sequence[Tensor] | None = None, graph: bool = True
) -> Tree:
    """The gradient of sum_i <of_i, weights_i>, with its graph; zero without dependence."""
    weights = weights or [torch.ones_like(value) for value in of]
    pairs = [(o, w) for o, w in zip(of, weights, strict=True) if o.requires_grad]
    if not pairs:
        return tree.zeros_like(wrt)
    found = torch.autograd.grad(
        [o for o, _ in pairs],
        list(wrt.values()),
        [w for _, w in pairs],
        retain_graph=True,
        create_graph=graph,
        allow_unused=True,
        materialize_grads=True,
    )
    return dict(zip(wrt, found, strict=True))


def _entry(part: Tree, name: str, like: Tensor | None = None) -> Tensor:
    """One entry of a tree; zero, of the shape of ``like`` or a number, where it has none."""
    if name in part:
        return part[name]
    return torch.zeros((), dtype=torch.float64) if like is None else torch.zeros_like(like)


def _columns(local: LocalLoss, running: Sequence[str]) -> dict[str, Tree]:
    """By count of batches: r'(count) - r'(count - 1), where the layer has no momentum."""
    columns: dict[str, Tree] = {}
    before = local.transition.before.buffers
    for count in running:
        layer: Any = local.problem.model.get_submodule(owner_of(count))
        if before[count].is_floating_point() or layer.momentum is not None or before[count] < 1:
            continue
        mine = [n for n in running if owner_of(n) == owner_of(count) and n != count]
        here = advance(local, local.params, {}).buffers
        less = advance(local, local.params, {count: before[count] - 1}).buffers
        columns[count] = {n: here[n] - less[n] for n in mine}
    return columns


def _check_followed(local: LocalLoss, traced: Traced, moving: Tree) -> None:
    """Raise where the recorded update moved a statistic in another way than ``trace`` does."""
    of_step, of_itself = FOLLOWED
    for name, before in moving.items():
        recorded = local.transition.after.buffers[name]
        gap = tree.norm({name: recorded - traced.buffers[name].detach()})
        step, size = tree.norm({name: recorded - before.detach()}), tree.norm({name: recorded})
        if not gap <= of_step * step + of_itself * size:
            raise unknown(name, f"update {local.transition.index} changed")
