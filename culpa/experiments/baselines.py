"""Stage embeddings by DVEmb, to compare with: a baseline, not culpa's own estimate.

``culpa.dvemb`` sweeps backwards, one behaviour at a time; correlations over hundreds of test points
need the same numbers for every point. As everything in DVEmb is linear, the sweep forwards that
adds a stage's embeddings up gives them all at once: inside and after the stage

    D <- D - eta_k F_k D,      and inside also      D <- D - eta_k grad L(theta_k)

with F_k the empirical Fisher matrix of the batch (dvemb.py has the source and the formulas). The
score of a test point is grad gamma . D.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from culpa import tree
from culpa.dynamics.local import LocalLoss, differentiable_twice
from culpa.errors import OptionError, UnsupportedError
from culpa.estimators.dvemb import SOURCE
from culpa.estimators.embedding import StageEmbeddings
from culpa.problem import Problem
from culpa.trajectory.run import Run
from culpa.trajectory.walk import forward, session
from culpa.tree import Tree


def dvemb_embeddings(run: Run, problem: Problem) -> StageEmbeddings:
    """DVEmb of every stage of a run by SGD, for ``score`` (``effect`` is none of its notions).

    Learning rates are all it knows of the optimizer. With momentum mu its embeddings are some
    1 - mu of the others' size: compare ranks and correlations.

    Args:
        run: the recorded run.
        problem: with ``example_losses``.

    Returns:
        Embeddings without trust. Cost: one replay and, per update, one forward-mode product and one
        backward pass for each stage that has begun.

    Raises:
        OptionError: without ``example_losses``.
        UnsupportedError: for another optimizer than SGD, or accumulated updates.
    """
    if problem.example_losses is None:
        raise OptionError("dvemb_embeddings needs Problem(model, loss, example_losses=...).")
    names = {run.step(k).optimizer.name for k in range(run.num_steps)}
    if names != {"SGD"}:
        raise UnsupportedError(
            f"DVEmb's dynamics are those of SGD, not {', '.join(sorted(names))}."
        )
    found: dict[str, Tree] = {stage.name: {} for stage in run.stages}
    with session(run, problem) as engine, differentiable_twice():
        for transition in forward(run, engine, 0, run.num_steps):
            local, k = LocalLoss(problem, transition), transition.index
            if len(transition.batches) > 1:
                raise UnsupportedError(
                    f"update {k} was accumulated over {len(transition.batches)} micro-batches;"
                    " dvemb_embeddings takes one."
                )
            rate = float(transition.record.hypers[0]["lr"])
            begun = [stage for stage in run.stages if stage.start <= k]
            pullback = torch.func.vjp(local.example_values, local.params)[1]
            for stage in begun:
                moved = found[stage.name]
                if moved:
                    moved = tree.subtract(moved, tree.scale(rate, _fisher(local, pullback, moved)))
                if k in stage.updates:
                    pull = tree.scale(rate, local.spread(transition.grads))
                    moved = tree.subtract(moved or tree.zeros_like(pull), pull)
                found[stage.name] = moved
    facts = {"propagator": "DVEmb", "source": SOURCE, "root_digest": run.root_digest}
    return StageEmbeddings(
        run.stages, found, {}, run.final_state(), run.final_buffers(), facts, problem
    )


def _fisher(local: LocalLoss, pullback: Callable[[Tensor], tuple[Tree]], vector: Tree) -> Tree:
    """F v = sum_i g_i (g_i . v) / B; the examples' shares of the loss are l_i / B."""
    direction = {name: vector[name] for name in local.params}
    along = torch.func.jvp(local.example_values, (local.params,), (direction,))[1].detach()
    bent = pullback(along * len(along))[0]
    return tree.map_values(Tensor.detach, bent)
