"""Execute a ``Plan`` under ``culpa.record``: the library is only called through its façade."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

import culpa
from oracles.retrain import Plan, set_groups


@dataclass(frozen=True)
class Recorded:
    """A recorded plan: the opened run, a problem whose model is at other weights, and the model."""

    run: Any
    problem: Any
    trained: nn.Module


def record(plan: Plan, path: Path, **options: Any) -> Recorded:
    """Train as the plan says, recording; check nothing.

    The problem handed back holds a model of the same shape whose weights are scrambled: whatever an
    estimator or a replay needs of the weights it must take from the record.
    """
    model = plan.model()
    problem = culpa.Problem(model, plan.loss, example_losses=plan.example_losses)
    optimizer = plan.optimizers[0](model)
    if plan.clip_grad_norm is not None:
        options["clip_grad_norm"] = plan.clip_grad_norm
    with culpa.record(path, problem, optimizer, **options) as recorder:
        for name, start, stop in plan.stages:
            replaced = {}
            if start > 0 and start in plan.optimizers:
                optimizer = plan.optimizers[start](model)
                replaced = {"optimizer": optimizer}
            with recorder.stage(name, **replaced):
                for k, batch in enumerate(recorder.batches(plan.batches[start:stop]), start):
                    set_groups(plan, k, optimizer)
                    optimizer.zero_grad()
                    plan.loss(model, batch).backward()
                    if plan.clip_grad_norm is not None:
                        nn.utils.clip_grad_norm_(model.parameters(), plan.clip_grad_norm)
                    optimizer.step()
    other = plan.model()
    for parameter in other.parameters():
        parameter.data.mul_(-1.5).add_(0.25)
    again = culpa.Problem(other, plan.loss, example_losses=plan.example_losses)
    return Recorded(culpa.open_run(path), again, model)
