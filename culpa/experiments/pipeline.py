"""Pipelines of jobs, and how well estimates of their effects agree with retraining (§E.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from culpa.behaviour import Behaviour
from culpa.behaviours import accuracy
from culpa.behaviours.outputs import classify
from culpa.dynamics.propagator import Exact
from culpa.estimators.embed import embed
from culpa.experiments import measures
from culpa.experiments.baselines import dvemb_embeddings
from culpa.problem import Problem
from culpa.trajectory.record import record
from culpa.trajectory.replay import Counterfactual, replay
from culpa.trajectory.run import Run

Batch = tuple[Any, Tensor]
OptimizerOf = Callable[[nn.Module], torch.optim.Optimizer]

DVEMB = "DVEmb"
ADDITIVE = "AA-Score, additive (the paper's)"
BLOCK = "AA-Score, block"
EFFECT = "culpa's default (`effect`)"
METHODS = (DVEMB, ADDITIVE, BLOCK, EFFECT)
RESTART = (
    "The paper's retraining (§E.1): the stage left out, later jobs from the state before it, each"
    " with a fresh optimizer."
)


@dataclass(frozen=True)
class Job:
    """A stage: its batches in order.

    Attributes:
        fresh: whether it is a job of its own, with an optimizer of its own; else that of the job
            before goes on.
        change: hyperparameters that the loop writes into the optimizer when the stage begins.
    """

    name: str
    batches: Sequence[Batch]
    fresh: bool = True
    change: Mapping[str, float] | None = None


@dataclass(frozen=True)
class SGD:
    """An optimizer of ``torch.optim`` for what the model trains."""

    lr: float
    momentum: float = 0.9
    weight_decay: float = 1e-5

    def __call__(self, model: nn.Module) -> torch.optim.Optimizer:
        """For the parameters that are not frozen."""
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.SGD(
            trained, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )


def losses(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of every example, ``[B]``."""
    logits, targets = classify(model, batch, "cross-entropy")
    return cross_entropy(logits, targets, reduction="none")


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Its mean."""
    return losses(model, batch).mean()


def right_share(model: nn.Module, batch: Batch) -> float:
    """Accuracy, in evaluation mode."""
    return float(accuracy("accuracy", batch).values(model).mean())


def train(
    path: Path,
    model: nn.Module,
    jobs: Sequence[Job],
    optimizer_of: OptimizerOf,
    *,
    fresh: bool = True,
) -> Problem:
    """Train on the jobs in turn, recorded into ``path``.

    ``fresh``: each that is ``fresh`` with an optimizer of its own; else all are stages of one job.
    """
    problem = Problem(model, loss, losses)
    model.train()
    optimizer = optimizer_of(model)
    with record(path, problem, optimizer, overwrite=True) as recorder:
        for at, job in enumerate(jobs):
            anew = fresh and job.fresh and at > 0
            if anew:
                optimizer = optimizer_of(model)
            with recorder.stage(job.name, optimizer=optimizer if anew else None):
                for group in optimizer.param_groups:
                    group.update(job.change or {})
                for batch in recorder.batches(job.batches):
                    optimizer.zero_grad()
                    loss(model, batch).backward()
                    optimizer.step()
    return problem


def retrained(run: Run, problem: Problem) -> list[Counterfactual]:
    """The run without each of its stages, by the restart protocol."""
    return [replay(run, problem, without=s.name, counterfactual="restart") for s in run.stages]


def correlations(
    run: Run,
    problem: Problem,
    behaviours: Sequence[Behaviour],
    methods: Sequence[str] = METHODS,
) -> dict[str, Any]:
    """Effects of each stage on each behaviour's test points, estimated and retrained.

    Returns:
        ``pearson[method][behaviour][stage]``: correlation over test points with retraining;
        ``means[method][behaviour][stage]``: mean effects, those of retraining as ``"retrained"``.
    """
    without = retrained(run, problem)
    truths = [torch.stack([w.effect(b) for w in without]) for b in behaviours]
    found: dict[str, Any] = {"pearson": {}, "means": {"retrained": _means(truths)}}
    for method in methods:
        estimates = _estimates(method, run, problem, behaviours)
        found["pearson"][method] = [
            [measures.pearson(e, t) for e, t in zip(estimate, truth, strict=True)]
            for estimate, truth in zip(estimates, truths, strict=True)
        ]
        found["means"][method] = _means(estimates)
    return found


def one_by_one(run: Run, problem: Problem, behaviours: Sequence[Behaviour]) -> dict[str, Any]:
    """What the additive form is to be: every update of a stage skipped alone and retrained.

    Returns:
        ``"score"``: the sum's correlation with the additive AA-Score; ``"stage"``: with the true
        effect of the stage. Both ``[behaviour][stage]``.
    """
    additive = embed(run, problem, form="additive", propagator=Exact())
    sums = [torch.zeros_like(additive.score(b)) for b in behaviours]
    whole = retrained(run, problem)
    for at, stage in enumerate(run.stages):
        for k in stage.updates:
            without = replay(run, problem, without=[k])
            for total, behaviour in zip(sums, behaviours, strict=True):
                total[at] += without.effect(behaviour)
    return {
        "score": [
            [measures.pearson(score, total) for score, total in zip(scores, totals, strict=True)]
            for scores, totals in zip(map(additive.score, behaviours), sums, strict=True)
        ],
        "stage": [
            [measures.pearson(totals[s], whole[s].effect(b)) for s in range(len(whole))]
            for totals, b in zip(sums, behaviours, strict=True)
        ],
    }


def _estimates(
    method: str, run: Run, problem: Problem, behaviours: Sequence[Behaviour]
) -> list[Tensor]:
    """Per behaviour ``[stages, n]``."""
    if method == DVEMB:
        embeddings = dvemb_embeddings(run, problem)
    elif method == EFFECT:
        # Named: the default would replay where there are but two stages.
        chosen = Exact(at="gauss") if len(run.stages) < 3 else None
        embeddings = embed(run, problem, propagator=chosen, counterfactual="restart")
        return [embeddings.effect(b) for b in behaviours]
    else:
        # The additive form sums the effects of single updates, after which no optimizer restarts.
        form, meaning = ("additive", "skip") if method == ADDITIVE else ("block", "restart")
        embeddings = embed(run, problem, form=form, propagator=Exact(), counterfactual=meaning)
    return [embeddings.score(b) for b in behaviours]


def _means(effects: list[Tensor]) -> list[list[float]]:
    return [e.mean(1).tolist() for e in effects]
