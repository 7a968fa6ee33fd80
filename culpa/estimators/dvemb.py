"""DVEmb, data value embedding: a baseline to compare with, not culpa's own estimate.

Wang, Song, Zou, Mittal, Jia, Capturing the Temporal Dependence of Training Data Influence, ICLR
2025 (arXiv 2412.09538), taken to stages as the AA-Score paper does in its Section 5.2: summed over
each batch, then over the batches of a stage. It takes training for plain SGD on the examples'
losses and the Hessian for the empirical Fisher matrix of the batch,

    theta_{k+1} = theta_k - eta_k sum_i w_i g_i,      g_i = grad l_i(theta_k), sum_i w_i = 1
    F_k = sum_i w_i g_i g_i^T
    e_{k,i} = eta_k w_i (I - eta_{K-1} F_{K-1}) ... (I - eta_{k+1} F_{k+1}) g_i

with w_i = 1/B. e_{k,i} is the embedding of example i at update k: theta_K without its gradient
there, minus theta_K. Its score is -grad gamma(theta_K) . e_{k,i}.

The empirical Fisher matrix carries squared residuals where the Hessian has curvature (Kunstner,
Balles, Hennig, Limitations of the Empirical Fisher Approximation, NeurIPS 2019). On least squares
with a mislabelled stage the scores of single updates correlate .99 with retraining at learning rate
.002, .21 at .03, where no curvature at all gives .99 and the Hessian 1.00 (test_dvemb.py).

The embeddings themselves, parameters times examples, are never built: one reverse sweep carries
p = grad gamma, p <- p - F_k eta_k p, and reads off -p_{k+1} . eta_k w_i g_i for the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from culpa import tree
from culpa.behaviour import Behaviour
from culpa.dynamics.local import LocalLoss, differentiable_twice
from culpa.errors import OptionError, ProblemError, UnsupportedError
from culpa.estimators.adjoint import gradient_of
from culpa.estimators.effects import refuse_running_statistics
from culpa.problem import Problem
from culpa.progress import Progress, Silent
from culpa.trajectory.fidelity import BITWISE
from culpa.trajectory.hold import backward
from culpa.trajectory.run import Run
from culpa.trajectory.schema import StepRecord
from culpa.trajectory.walk import session
from culpa.tree import Tree

SOURCE = (
    "Wang, Song, Zou, Mittal, Jia, Capturing the Temporal Dependence of Training Data Influence, "
    "ICLR 2025, arXiv 2412.09538"
)
LOSS_TOLERANCE = 1e-2
"""Largest relative distance of the mean of the example losses from the recorded loss."""


@dataclass(frozen=True)
class DVEmbScores:
    """DVEmb's scores, a baseline. Positive: it raised the behaviour. In each behaviour's unit.

    Attributes:
        steps: float64 ``[num_steps, num_behaviours]``: sums over each update's batch.
        stages: float64 ``[num_stages, num_behaviours]``: sums of steps, in order of ``run.stages``.
        examples: float64 ``[num_distinct_training_examples, num_behaviours]``: sums over all
            updates that used the example.
        behaviours: what the columns are about.
        claim: ``"bitwise"``, or the drift of the replay; see ``culpa.replay(allow_drift=True)``.
    """

    steps: Float64[Tensor, "updates behaviours"]
    stages: Float64[Tensor, "stages behaviours"]
    examples: Float64[Tensor, "examples behaviours"]
    behaviours: tuple[str, ...]
    claim: str = BITWISE


def dvemb(
    run: Run,
    problem: Problem,
    behaviours: Sequence[Behaviour],
    *,
    allow_drift: bool = False,
    progress: Progress | None = None,
) -> DVEmbScores:
    """Score updates, stages and examples by DVEmb: a baseline, not culpa's own estimate.

    What it estimates is the effect of a gradient of zero (``counterfactual="zero-gradient"`` of
    ``culpa.attribute``). It knows learning rates only: momentum, dampening, weight decay and
    clipping are not in its dynamics, so of a run that has them each update counts as -lr times its
    gradient. With momentum mu all scores are then some (1 - mu) of their size; compare ranks.

    Args:
        run: the recorded run, made by ``torch.optim.SGD``.
        problem: the problem it was recorded with, with ``example_losses``; its model is borrowed
            and left as it was.
        behaviours: differentiable in the parameters.
        allow_drift: measure what does not reproduce instead of refusing it; see ``culpa.replay``.
        progress: see ``culpa.progress``.

    Returns:
        DVEmbScores. Cost: one replay of the run and, per update, one forward pass and for each
        behaviour one forward-mode product and one backward pass. Memory: O(sqrt(K)) states.

    Raises:
        OptionError: without behaviours or without ``example_losses``.
        UnsupportedError: for an optimizer other than SGD, and for changing running statistics.
        ProblemError: if the mean of the example losses is not the recorded loss.
        EnvironmentDifference: if a replay here need not be bitwise.
        IntegrityError: if an update does not reproduce.
    """
    if isinstance(behaviours, Behaviour) or not behaviours:
        raise OptionError(f"dvemb needs a list of behaviours, got {behaviours!r}.")
    if problem.example_losses is None:
        raise OptionError(
            "dvemb needs Problem(model, loss, example_losses=...): a function (model, batch) -> [B]"
            " whose mean is the loss."
        )
    _refuse_other_optimizers(run)
    refuse_running_statistics(run, "culpa.dvemb")
    run.frozen.give(dict(problem.model.named_parameters()))
    final, buffers = run.final_state(), run.final_buffers()
    trained = run.state(run.num_steps).params.keys()
    width = len(behaviours)
    steps = torch.zeros(run.num_steps, width, dtype=torch.float64)
    examples = torch.zeros(run.num_examples, width, dtype=torch.float64)
    watch = progress or Silent()
    watch.start("dvemb", run.num_steps)
    try:
        with session(run, problem, allow_drift) as engine:
            adjoints = [gradient_of(problem, b, final, buffers, trained) for b in behaviours]
            for transition in backward(run, engine):
                k, record = transition.index, transition.record
                ids = torch.tensor(run.example_ids(k))
                scores = _pull(LocalLoss(problem, transition), record, adjoints)
                steps[k] = scores.sum(0)
                examples.index_add_(0, ids, scores)
                watch.advance()
    finally:
        watch.finish()
    rows = [steps[s.start : s.stop].sum(0) for s in run.stages]
    stages = torch.stack(rows) if rows else steps[:0]
    names = tuple(b.name for b in behaviours)
    return DVEmbScores(steps, stages, examples, names, engine.fidelity.claim)


def _pull(
    local: LocalLoss, record: StepRecord, adjoints: list[Tree]
) -> Float64[Tensor, "examples behaviours"]:
    """The scores of one batch; p <- p - F eta p for every behaviour, in place."""
    rates, weights = _rates(record), _weights(record)
    columns: list[Tensor] = []
    with differentiable_twice():
        found = torch.func.vjp(local.example_values, local.params)
        shares, pullback = found[0], found[1]
        _check(local, shares.detach(), len(weights))
        weights = weights.to(shares)
        for q, p in enumerate(adjoints):
            moved = {name: rates.get(name, 0.0) * p[name] for name in local.params}
            # w_i g_i . eta p, and with it F eta p = sum_i g_i (w_i g_i . eta p).
            along = torch.func.jvp(local.example_values, (local.params,), (moved,))[1].detach()
            cotangent = torch.where(weights != 0, along / weights, 0.0)
            bent: Tree = pullback(cotangent)[0]
            adjoints[q] = tree.subtract(p, tree.map_values(Tensor.detach, bent))
            columns.append(-along.double().cpu())
    return torch.stack(columns, 1)


def _rates(record: StepRecord) -> dict[str, float]:
    """eta by parameter, with the sign of the step."""
    return {
        name: -float(group.hyper["lr"]) if group.hyper.get("maximize") else float(group.hyper["lr"])
        for group in record.groups
        for name in group.names
    }


def _weights(record: StepRecord) -> Tensor:
    """w_i of every example of the update: its micro-batch's weight over its size, float64."""
    count = len(record.contributing)
    shares = record.weights or (1 / count,) * count
    sizes = [len(micro.rows) for micro in record.contributing]
    return torch.cat(
        [
            torch.full((size,), share / size, dtype=torch.float64)
            for size, share in zip(sizes, shares, strict=True)
        ]
    )


def _check(local: LocalLoss, shares: Tensor, rows: int) -> None:
    """Raise unless there is one loss for every row, and together they are the update's loss."""
    if len(shares) != rows:
        raise ProblemError(
            f"example_losses gave {len(shares)} losses for the {rows} rows of update"
            f" {local.transition.index}. Return one loss a row, not one a token or class."
        )
    total, recorded = float(shares.sum()), local.transition.loss
    if abs(total - recorded) > LOSS_TOLERANCE * abs(recorded) + 1e-6:
        raise ProblemError(
            f"the mean of example_losses at update {local.transition.index} is {total:.6g}, the"
            f" loss {recorded:.6g}. DVEmb needs a loss that is the mean of its example losses."
        )


def _refuse_other_optimizers(run: Run) -> None:
    for name in dict.fromkeys(run.step(k).optimizer.name for k in range(run.num_steps)):
        if name != "SGD":
            raise UnsupportedError(
                f"DVEmb's dynamics are those of SGD, and {run.path} was trained with {name}."
                " culpa.attribute follows the optimizer that was used."
            )
