"""An experiment's jobs as a ``Plan`` for skip-and-retrain that shares nothing with the library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from oracles.problems import cross_entropy
from oracles.retrain import Plan


def network(seed: int) -> nn.Module:
    """784-128-128-10, as the experiments draw its weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [
            nn.Linear(784, 128),
            nn.ReLU(),
            nn.Linear(128, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        ]
        return nn.Sequential(*layers)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-5)


def plan(jobs: Sequence[Any], seed: int) -> Plan:
    """What the experiment trains, written down from the jobs' batches."""
    batches = [batch for job in jobs for batch in job.batches]
    starts = [sum(len(job.batches) for job in jobs[:at]) for at in range(len(jobs) + 1)]
    stages = [(job.name, starts[at], starts[at + 1]) for at, job in enumerate(jobs)]
    changes = {starts[at]: dict(job.change) for at, job in enumerate(jobs) if job.change}
    return Plan(
        model=lambda: network(seed),
        loss=cross_entropy,
        optimizers={s: sgd for s, job in zip(starts, jobs, strict=False) if s == 0 or job.fresh},
        batches=batches,
        rates=[(1e-3,)] * len(batches),
        stages=stages,
        options=changes,
    )
