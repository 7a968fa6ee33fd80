"""Embeddings that need no estimate: one or two stages are replayed without them, exactly.

A sweep passes every observed state once, which with a thinned record is one replay already, and on
top of it carries each stage; a replay without a stage is one replay at most, and exact. So where
one or two stages are to be embedded, no sweep is cheaper.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from culpa import tree
from culpa.estimators.embedding import StageEmbeddings, StageTrust
from culpa.estimators.trust import TRUSTED
from culpa.problem import Problem
from culpa.progress import Progress
from culpa.trajectory.fidelity import weakest
from culpa.trajectory.replay import replay
from culpa.trajectory.run import Run
from culpa.trajectory.schema import Stage
from culpa.tree import Tree

REPLAYED_UP_TO = 2
"""So many stages are replayed where no propagator is named."""


def embed_by_replay(
    run: Run,
    problem: Problem,
    stages: Sequence[Stage],
    *,
    counterfactual: str,
    allow_drift: bool,
    progress: Progress | None,
) -> StageEmbeddings:
    """D_S = theta_K - theta_K(without S) of each stage by ``culpa.replay``: no approximation.

    Returns:
        The embeddings, all of them trusted; nothing was linearised, so the residual is nan.
        ``facts["strategy"]`` says that they were replayed. Cost: one replay for each stage.
    """
    run.frozen.give(dict(problem.model.named_parameters()))
    final, last = run.final_state(), run.state(run.num_steps)
    size = tree.norm(last.params)
    displacements: dict[str, Tree] = {}
    statistics: dict[str, Tree] = {}
    trust: dict[str, StageTrust] = {}
    claims: list[str] = []
    ordered = sorted(stages, key=lambda s: s.start)
    for stage in ordered:
        without = replay(
            run,
            problem,
            without=stage.updates,
            counterfactual=counterfactual,
            allow_drift=allow_drift,
            progress=progress,
        )
        moved = {n: final[n] - without.state[n] for n in last.params}
        relative = tree.norm(moved) / size if size > 0.0 else float("inf")
        displacements[stage.name] = moved
        statistics[stage.name] = {
            n: b - without.buffers[n]
            for n, b in last.buffers.items()
            if b.dtype != torch.bool and not b.equal(without.buffers[n])
        }
        growth = _growth(run, stage, tree.norm(moved))
        trust[stage.name] = StageTrust(relative, growth, float("nan"), TRUSTED)
        claims.append(without.claim)
    facts = {
        "form": "block",
        "order": "1",
        "propagator": "replayed",
        "strategy": (
            f"replayed exactly: for {REPLAYED_UP_TO} stages or fewer that costs less than any sweep"
        ),
        "counterfactual": counterfactual,
        "root_digest": run.root_digest,
        "claim": weakest(claims),
    }
    return StageEmbeddings(
        ordered, displacements, trust, final, last.buffers, facts, problem, statistics
    )


def _growth(run: Run, stage: Stage, now: float) -> float:
    """||D|| over its norm at the end of the stage; nan where the record keeps no states there."""
    if stage.start not in run.kept_states or stage.stop not in run.kept_states:
        return float("nan")
    made = tree.subtract(run.state(stage.stop).params, run.state(stage.start).params)
    then = tree.norm(made)
    return now / then if then > 0.0 else 1.0
