"""Which layers carry the blame: a stage's effect split by layer, adding up to the whole.

A layer is a module that holds parameters itself; its name is what its parameters' names begin
with (``blocks.0.mlp`` for ``blocks.0.mlp.weight``). A parameter of the outermost module is a layer
of its own. Running statistics belong to the layer that keeps them. With D_l the part of a stage's
displacement D that lies in layer l:

    first order          grad gamma(theta_K) . D_l, which sums to the AA-Score by linearity;
    the whole effect     sum over l of  integral_0^1 grad gamma(theta_K - (1 - a) D) . D_l da
                         = gamma(theta_K) - gamma(theta_K - D)

The integrals are integrated gradients (Sundararajan, Taly, Yan, Axiomatic Attribution for Deep
Networks, ICML 2017) over parameters instead of inputs, with the model without the stage as the
baseline. Completeness, their equation 3, is exact for the integral; Gauss-Legendre quadrature
leaves a residual, which is reported. The split belongs to the straight line between both models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from culpa import tree
from culpa.behaviour import Behaviour
from culpa.dynamics.running import floating
from culpa.errors import OptionError
from culpa.estimators.adjoint import gradients_of
from culpa.estimators.embedding import StageEmbeddings
from culpa.problem import Problem
from culpa.trajectory import rng
from culpa.trajectory.state import on_cpu
from culpa.tree import Tree

SOURCE = "Sundararajan, Taly, Yan, Axiomatic Attribution for Deep Networks, ICML 2017"


@dataclass(frozen=True)
class LayerEffects:
    """The effect of every stage on one behaviour's mean, split by layer. Positive: it raised it.

    Attributes:
        stages: names, the order of every vector here.
        layers: by layer, float64 ``[num_stages]``, in the behaviour's unit.
        effect: float64 ``[num_stages]``, what is split: the mean of ``StageEmbeddings.effect``.
        residual: float64 ``[num_stages]``, ``effect`` minus the sum over layers: the quadrature's
            error. Kinks (ReLU) leave more than smooth activations.
        points: of the quadrature.
    """

    stages: tuple[str, ...]
    layers: dict[str, Float64[Tensor, " stages"]]
    effect: Float64[Tensor, " stages"]
    residual: Float64[Tensor, " stages"]
    points: int


def layer_of(parameter: str) -> str:
    """The layer that a parameter belongs to, by its name."""
    return parameter.rpartition(".")[0] or parameter


def by_layer(
    embeddings: StageEmbeddings, behaviour: Behaviour
) -> dict[str, Float64[Tensor, " stages"]]:
    """The AA-Score of every stage split by layer: grad gamma . D, layer by layer.

    Args:
        embeddings: what ``culpa.embed`` returned.
        behaviour: differentiable in the parameters.

    Returns:
        By layer, in the model's order, float64 ``[num_stages]``; their sum is the mean over test
        points of ``embeddings.score(behaviour)``. Positive: the stage raised the behaviour through
        this layer. Cost: one gradient of the behaviour.

    Raises:
        OptionError: for embeddings loaded without a problem, or a behaviour without a gradient.
    """
    names = _names(embeddings)
    final = embeddings.final | embeddings.buffers
    gradient = _gradient(embeddings, behaviour, {name: final[name] for name in names})
    split = {layer: torch.zeros(len(embeddings), dtype=torch.float64) for layer in _layers(names)}
    for at, displacement in enumerate(_displacements(embeddings)):
        _add(split, at, gradient, displacement, 1.0)
    return split


def effect_by_layer(
    embeddings: StageEmbeddings, behaviour: Behaviour, points: int = 8
) -> LayerEffects:
    """The effect of every stage, gamma(theta_K) - gamma(theta_K - D), split by layer.

    Args:
        embeddings: what ``culpa.embed`` returned.
        behaviour: differentiable in the parameters.
        points: of the Gauss-Legendre quadrature along the displacement, at least 1 (the midpoint).

    Returns:
        LayerEffects with what the quadrature left over. Cost: ``points`` gradients of the behaviour
        and one evaluation for each stage.

    Raises:
        OptionError: as ``by_layer``, and for fewer than one point.
    """
    if isinstance(points, bool) or points < 1:
        raise OptionError(f"effect_by_layer(points=...) takes a number from 1 on, got {points!r}.")
    split = {
        layer: torch.zeros(len(embeddings), dtype=torch.float64)
        for layer in _layers(_names(embeddings))
    }
    nodes, weights = np.polynomial.legendre.leggauss(points)
    final = embeddings.final | embeddings.buffers
    for at, displacement in enumerate(_displacements(embeddings)):
        end = {name: final[name] for name in displacement}
        for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
            back = 0.5 * (1.0 - node)  # [-1, 1] to the share of D that is taken away
            where = tree.add(end, displacement, -back)
            _add(split, at, _gradient(embeddings, behaviour, where), displacement, 0.5 * weight)
    effect = embeddings.effect(behaviour).mean(1)
    residual = effect - torch.stack(list(split.values())).sum(0)
    return LayerEffects(tuple(embeddings), split, effect, residual, points)


def _gradient(embeddings: StageEmbeddings, behaviour: Behaviour, where: Tree) -> Tree:
    """The gradient of the behaviour's mean at ``where`` with respect to the names in it."""
    params = {name: where.get(name, value) for name, value in embeddings.final.items()}
    buffers = {name: where.get(name, value) for name, value in embeddings.buffers.items()}
    names, running = where.keys() & params.keys(), where.keys() & buffers.keys()
    with rng.preserved():
        slopes, moving = gradients_of(
            _problem(embeddings), behaviour, params, buffers, names, running
        )
    return on_cpu(slopes | moving)  # as the displacements are


def _displacements(embeddings: StageEmbeddings) -> list[Tree]:
    """Of every stage, the displacement of parameters and running statistics."""
    return [embeddings[s] | floating(embeddings.statistics[s]) for s in embeddings]


def _add(
    split: Mapping[str, Tensor], at: int, gradient: Tree, displacement: Tree, weight: float
) -> None:
    """Add weight * gradient . D to the stage's entry of every layer, accumulated in float64."""
    for name, value in displacement.items():
        part = tree.dot({name: gradient[name]}, {name: value})
        split[layer_of(name)][at] += weight * part


def _names(embeddings: StageEmbeddings) -> list[str]:
    """Every parameter and running statistic that some stage moved, in the model's order."""
    moved = {name for displacement in _displacements(embeddings) for name in displacement}
    model = _problem(embeddings).model
    ordered = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    return [name for name in ordered if name in moved]


def _layers(names: list[str]) -> list[str]:
    return list(dict.fromkeys(map(layer_of, names)))


def _problem(embeddings: StageEmbeddings) -> Problem:
    if embeddings.problem is None:
        raise OptionError(
            "these embeddings were loaded without a problem, and a behaviour needs its model: "
            "StageEmbeddings.load(path, problem)."
        )
    return embeddings.problem
