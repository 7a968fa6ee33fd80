"""What worker processes import: a run, and functions that build the problem it is judged by."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import culpa
from culpa.auditing.record import AuditRecord

STAGES, PER_STAGE = 4, 5
MARKS = "CULPA_TEST_MARKS"
"""Environment: a folder where workers leave marks."""


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def log_likelihoods(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return -cross_entropy(model(batch[0]), batch[1], reduction="none")


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(8)
    inputs = torch.randn(STAGES * PER_STAGE + 1, 12, 6, generator=generator)
    labels = torch.randint(3, (len(inputs), 12), generator=generator)
    return list(zip(inputs, labels, strict=True))


def make() -> tuple[culpa.Problem, list[culpa.Behaviour]]:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    return culpa.Problem(model, loss), [culpa.Behaviour("right", log_likelihoods, batches()[-1])]


def make_another() -> tuple[culpa.Problem, list[culpa.Behaviour]]:
    """The same, but for the behaviour's data."""
    problem, _ = make()
    return problem, [culpa.Behaviour("right", log_likelihoods, batches()[0])]


def make_in_the_second_worker() -> tuple[culpa.Problem, list[culpa.Behaviour]]:
    """The first process to call this is killed, as for want of memory."""
    mark = Path(os.environ[MARKS]) / "killed"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return make()


def make_never() -> tuple[culpa.Problem, list[culpa.Behaviour]]:
    """Every process that calls this is killed."""
    os.kill(os.getpid(), signal.SIGKILL)
    return make()


def train(folder: Path) -> culpa.Run:
    problem, _ = make()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.2, momentum=0.9)
    with culpa.record(folder, problem, optimizer) as recorder:
        for at in range(STAGES):
            with recorder.stage(f"stage {at}"):
                part = batches()[at * PER_STAGE : (at + 1) * PER_STAGE]
                for batch in recorder.batches(part):
                    optimizer.zero_grad()
                    loss(problem.model, batch).backward()
                    optimizer.step()
    return culpa.open_run(folder)


def audit(run: culpa.Run, **options: Any) -> AuditRecord:
    return culpa.audit(run, *make(), budget=4.0, **options).record


def without_times(record: AuditRecord) -> bytes:
    plain = [msgspec.structs.replace(s, seconds=0.0) for s in record.spent]
    return msgspec.json.encode(msgspec.structs.replace(record, created="", spent=plain))
