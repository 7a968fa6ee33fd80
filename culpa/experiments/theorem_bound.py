"""The bound of Theorem 4.1 with every constant measured along both trajectories.

The paper's proof (Appendix B) in numbers, on plain SGD: T_k(theta) = theta - eta g_k(theta) is the
update and M_k = I - eta H_k. With delta_k the true displacement, D_k its block estimate, e_k their
difference, b the end of the stage and h = K - b the updates after it:

    r_k     = |T_k(theta_k) - T_k(theta_k - delta_k) - M_k delta_k| <= beta |delta_k|^2
    |M_k|, |delta_{k+1}| / |delta_k| <= rho,   |delta_b| <= D_S = sum of |Delta_t| over the stage
    |e_K|   <= beta h rho^{2h} D_S^2
    |tau - tau_hat| <= (G beta h + B / 2) rho^{2h} D_S^2

G = |grad gamma|, B from gamma's own remainder, rho = e^{eta Lambda}. beta, rho, G and B are the
least that hold along both trajectories, so the bound holds as it stands and could not be tighter
in them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp

from culpa import tree
from culpa.behaviour import Behaviour
from culpa.dynamics.propagator import Exact
from culpa.estimators.embed import embed
from culpa.problem import Problem
from culpa.trajectory.replay import replay
from culpa.trajectory.run import Run
from culpa.tree import Tree

Batch = tuple[Tensor, Tensor]

POWER = 25
"""Steps of the power iteration for |M_k|, which comes from below."""


@dataclass(frozen=True)
class Measured:
    """The constants along one stage's two trajectories; see the head of this file."""

    beta: float
    rho: float


def gradient(model: nn.Module, params: Tree, batch: Batch) -> Tree:
    """g_k at ``params``."""

    def value(p: Tree) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, p, (batch[0],)), batch[1])

    return grad(value)(params)


def product(model: nn.Module, params: Tree, batch: Batch, vector: Tree) -> Tree:
    """H_k v."""

    def at(p: Tree) -> Tree:
        return gradient(model, p, batch)

    found: Tree = jvp(at, (params,), (vector,))[1]
    return found


def norm_of_step(model: nn.Module, params: Tree, batch: Batch, rate: float) -> float:
    """|I - eta H|, the largest singular value, by power iteration (the matrix is symmetric)."""
    generator = torch.Generator().manual_seed(0)
    v = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in params.items()}
    size = 1.0
    for _ in range(POWER):
        v = tree.scale(1 / tree.norm(v), v)
        v = tree.subtract(v, tree.scale(rate, product(model, params, batch, v)))
        size = tree.norm(v)
    return size


def stages_of(
    run: Run, problem: Problem, behaviour: Behaviour, batches: list[Batch], rate: float
) -> list[dict[str, float]]:
    """A row a stage, in order; the last stage has nothing after it and is left out."""
    path = [run.state(k).params for k in range(run.num_steps + 1)]
    found = embed(run, problem, propagator=Exact())
    score, trust = found.score(behaviour).mean(1), found.trust
    steps = [norm_of_step(problem.model, path[k], b, rate) for k, b in enumerate(batches)]
    slope = _slope(problem.model, path[-1], behaviour)
    rows: list[dict[str, float]] = []
    for at, stage in enumerate(run.stages[:-1]):
        without = replay(run, problem, without=stage.name)
        truth = float(without.effect(behaviour).mean())
        start, h = stage.stop, run.num_steps - stage.stop
        jumps = [tree.norm(tree.subtract(path[k + 1], path[k])) for k in stage.updates]
        measured, end = along(problem.model, path, path[stage.start], batches, start, rate, steps)
        delta = tree.subtract(path[-1], end)
        curved = abs(truth - tree.dot(slope, delta)) / tree.norm(delta) ** 2
        bound = (tree.norm(slope) * measured.beta * h + curved) * measured.rho ** (2 * h)
        rows.append(
            {
                "horizon": h,
                "error": abs(truth - float(score[at])),
                "bound": bound * sum(jumps) ** 2,
                "effect": abs(truth),
                "rate_of_growth": math.log(measured.rho) / rate,
                "growth": tree.norm(delta)
                / tree.norm(tree.subtract(path[start], path[stage.start])),
                "residual": trust[stage.name].residual * tree.norm(found[stage.name]),
                "retrained": tree.norm(tree.subtract(end, without.state)),
            }
        )
    return rows


def along(
    model: nn.Module,
    path: list[Tree],
    skipped: Tree,
    batches: list[Batch],
    start: int,
    rate: float,
    steps: list[float],
) -> tuple[Measured, Tree]:
    """Retrain from ``skipped`` at update ``start`` on, measuring; also where it ends."""
    beta, rho, there = 0.0, 1.0, skipped
    for k in range(start, len(batches)):
        here, batch = path[k], batches[k]
        delta = tree.subtract(here, there)
        moved = tree.subtract(there, tree.scale(rate, gradient(model, there, batch)))
        linear = tree.subtract(delta, tree.scale(rate, product(model, here, batch, delta)))
        true = tree.subtract(path[k + 1], moved)
        size = tree.norm(delta)
        beta = max(beta, tree.norm(tree.subtract(true, linear)) / size**2)
        rho = max(rho, tree.norm(true) / size, steps[k])
        there = moved
    return Measured(beta, rho), there


def _slope(model: nn.Module, params: Tree, behaviour: Behaviour) -> Tree:
    """grad gamma at the end of training, gamma the mean log-likelihood."""
    return tree.scale(-1.0, gradient(model, params, behaviour.batch))
