"""What ``culpa inspect`` tells of a run, as plain data: read from the folder, nothing executed."""

from __future__ import annotations

import math
import re

import msgspec
import torch

from culpa.auditing.prices import PRODUCTS, REPLAY
from culpa.dynamics import running
from culpa.dynamics.updates import Rules
from culpa.errors import CulpaError
from culpa.estimators.probes import PROBES
from culpa.trajectory import environment
from culpa.trajectory.environment import Difference
from culpa.trajectory.run import Run

SWEEP, PROBE = 3.2, 3.0
"""Gradients an update: of ``attribute`` for one behaviour besides its execution, and at its
probes (the others are in auditing/prices.py). Measured in processor time on a perceptron
784-512-512-10 with batches of 512; where a gradient takes under a millisecond, everything around
it makes it up to twice as much."""


class StageLine(msgspec.Struct, frozen=True, kw_only=True):
    """One stage: the updates ``[start, stop)``, their optimizer and learning rates."""

    name: str
    start: int
    stop: int
    optimizer: str
    lowest_rate: float
    highest_rate: float
    fresh_optimizer: bool


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """Something that can be done with the run, and what it would take."""

    name: str
    possible: bool
    why: str
    trainings: float | None
    seconds: float | None
    """Of one thread of computation on the recording machine, from its own updates."""


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """A run at a glance."""

    run: str
    status: str
    reason: str
    created: str
    culpa_version: str
    format: int
    root_digest: str
    updates: int
    examples: int
    parameters: int
    parameter_tensors: int
    frozen_tensors: int
    buffers: int
    stages: list[StageLine]
    kept_states: int
    states_in_all: int
    bytes: dict[str, int]
    training_seconds: float
    environment: dict[str, str]
    differences: list[str]
    """What differs here and can change the bits of a replay."""
    harmless_differences: list[str]
    """What differs here and cannot, with what a command sets by itself."""
    jobs: list[Job]


def summarize(run: Run) -> Summary:
    """Read a run."""
    manifest = run.manifest
    blocking, harmless = differences(run)
    return Summary(
        run=run.source.where,
        status=manifest.status,
        reason=manifest.reason,
        created=manifest.created,
        culpa_version=manifest.culpa_version,
        format=manifest.format,
        root_digest=run.root_digest,
        updates=run.num_steps,
        examples=run.num_examples,
        parameters=sum(_count(shape) for shape in manifest.parameters.values()),
        parameter_tensors=len(manifest.parameters),
        frozen_tensors=len(manifest.frozen),
        buffers=len(manifest.buffers),
        stages=[_stage(run, i) for i in range(len(run.stages))],
        kept_states=len(run.kept_states),
        states_in_all=run.num_steps + 1,
        bytes=run.bytes_by_part(),
        training_seconds=manifest.plain_seconds,
        environment=manifest.environment,
        differences=[str(d) for d in blocking],
        harmless_differences=[str(d) for d in harmless],
        jobs=_jobs(run),
    )


def differences(run: Run) -> tuple[list[Difference], list[Difference]]:
    """What differs here after culpa has set what it can and matters; and everything else."""
    recorded = run.manifest.environment
    kinds = recorded.get("device", "cpu").split(", ")
    there = [k for k in kinds if k == "cpu" or (k == "cuda" and torch.cuda.is_available())]
    tensors = [torch.empty(0, device=kind) for kind in there]
    before = environment.compare(recorded, environment.capture(tensors))
    with environment.as_recorded(recorded):
        after = environment.compare(recorded, environment.capture(tensors))
    blocking = [d for d in after if d.matters]
    names = {d.name for d in blocking}
    return blocking, [d for d in before if d.name not in names]


def _stage(run: Run, at: int) -> StageLine:
    stage = run.stages[at]
    steps = [run.step(k) for k in stage.updates]
    rates = [float(hyper["lr"]) for step in steps for hyper in step.hypers]
    return StageLine(
        name=stage.name,
        start=stage.start,
        stop=stage.stop,
        optimizer=", ".join(dict.fromkeys(step.optimizer.name for step in steps)),
        lowest_rate=min(rates, default=math.nan),
        highest_rate=max(rates, default=math.nan),
        fresh_optimizer=at == 0 or any(step.reset for step in steps[:1]),
    )


def _jobs(run: Run) -> list[Job]:
    plain, why = run.manifest.plain_seconds, _no_first_order(run)
    return [
        _job("replay", "", "the true effect of a stage", trainings(run, "replay"), plain),
        _job("attribute", why, "a score for every update", trainings(run, "attribute"), plain),
        _job("embed", why, "a model without each stage", trainings(run, "embed"), plain),
    ]


def trainings(run: Run, job: str) -> float:
    """What a job takes, roughly, in trainings of the run: nothing is executed to know it."""
    count = max(1, run.num_steps)
    if job == "attribute":
        return REPLAY + SWEEP + PROBE * min(PROBES, count) / count
    if job == "embed":
        return REPLAY + PRODUCTS * sum(count - stage.stop for stage in run.stages) / count
    return REPLAY


def _job(name: str, problem: str, why: str, trainings: float, plain: float) -> Job:
    return Job(
        name=name,
        possible=not problem,
        why=problem or why,
        trainings=None if problem else trainings,
        seconds=None if problem else trainings * plain,
    )


def _no_first_order(run: Run) -> str:
    """Why neither adjoint nor tangent is possible; empty if they are, as far as a run can tell."""
    try:
        for stage in run.stages:
            Rules().require_differentiable(run.step(stage.start).groups)
        running.names(run.state(0), run.state(run.num_steps))
    except CulpaError as error:
        return str(error)
    return ""


def _count(description: str) -> int:
    """``"float32 [128, 64]"`` -> 8192."""
    return math.prod(int(n) for n in re.findall(r"\d+", description.partition(" ")[2]))
