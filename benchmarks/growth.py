"""How cost grows: with updates, parameters, behaviours, stages and the size of a batch.

    python benchmarks/growth.py [--repeats 3] [--out benchmarks/results/growth.json]

A GELU perceptron of two hidden layers on made-up inputs of 64 numbers, SGD with momentum. Around
one middle (100 or 30 updates, four stages, 26,000 parameters, batches of 40, one behaviour) each
quantity runs over two decades or more. Each point: the processor seconds of recording, of
``replay`` without the first update, of ``attribute`` for every behaviour, and of ``embed`` of every
stage by ``Secant(0.25)``, each over those of the plain loop of the same round, in turn in one
process with one thread; medians of ``--repeats`` rounds, of which those of a case that takes longer
than ``LONG`` seconds have one less for every ``LONG``. Some ten minutes in all.

Along the updates also ``embed`` by ``Krylov()`` from the checkpoints between the four stages alone,
whose work does not depend on how many updates there were: once, since it takes ten seconds.

Memory: by how many bytes each raises resident memory while the number of updates grows, each in a
process of its own, with 280,000 parameters (a state of 2.2 MB) and batches of 10. Linux only.

The exponents are slopes of log(seconds) over log(quantity), by least squares over the upper decade.
Draws docs/results/figures/growth.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from growth_figure import exponents, mark, picture
from spent import peak, seconds
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import culpa
from culpa.experiments.frame.machine import machine

INPUTS, CLASSES = 64, 10
RATE, MOMENTUM = 1e-3, 0.9
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """One training run, and how much is asked of it."""

    updates: int = 100
    width: int = 128
    behaviours: int = 1
    stages: int = 4
    batch: int = 40

    @property
    def parameters(self) -> int:
        """Of ``network``."""
        return (INPUTS + 1 + self.width + 1 + CLASSES) * self.width + CLASSES

    def parts(self) -> list[tuple[int, int]]:
        """The updates of every stage."""
        ends = [round(self.updates * i / self.stages) for i in range(self.stages + 1)]
        return list(pairwise(ends))

    def network(self) -> nn.Module:
        """Two hidden layers of equal width."""
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(INPUTS, self.width),
            nn.GELU(),
            nn.Linear(self.width, self.width),
            nn.GELU(),
            nn.Linear(self.width, CLASSES),
        )

    def data(self) -> list[Batch]:
        """The batches, in memory: no two alike."""
        shape = (self.updates, self.batch)
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(*shape, INPUTS, generator=generator)
        return list(zip(inputs, torch.randint(CLASSES, shape, generator=generator), strict=True))

    def asked(self) -> list[culpa.Behaviour]:
        """Behaviours on 20 other inputs each."""
        generator = torch.Generator().manual_seed(2)
        inputs = torch.randn(self.behaviours, 20, INPUTS, generator=generator)
        targets = torch.randint(CLASSES, (self.behaviours, 20), generator=generator)
        parts = enumerate(zip(inputs, targets, strict=True))
        return [culpa.log_likelihood(f"part {i}", part) for i, part in parts]


MIDDLE = Case()
SHORT = replace(MIDDLE, updates=30)
AXES: dict[str, tuple[str, list[Case]]] = {
    "updates": ("updates K", [replace(MIDDLE, updates=k) for k in (10, 30, 100, 300, 1000)]),
    "parameters": ("parameters P", [replace(SHORT, width=w) for w in (11, 48, 128, 300, 970)]),
    "behaviours": ("behaviours Q", [replace(SHORT, behaviours=q) for q in (1, 3, 10, 30, 100)]),
    "stages": ("stages N", [replace(MIDDLE, stages=n) for n in (1, 3, 10, 30, 100)]),
    "batch": ("examples in a batch B", [replace(SHORT, batch=b) for b in (4, 12, 40, 120, 400)]),
}
"""What is drawn across, and the cases of every panel."""
TITLES = {axis: title for axis, (title, _) in AXES.items()}
PARTS = ("record", "replay", "attribute", "embed")
FROM_CHECKPOINTS = "embed, Krylov"
"""From the checkpoints between stages alone: measured along the updates."""
LONG = 20.0
"""Seconds; see the module."""
ROOMS = [Case(updates=k, width=490, batch=10) for k in (10, 30, 100, 300, 1000)]
"""The cases whose memory is measured."""


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """What the loops minimise."""
    return cross_entropy(model(batch[0]), batch[1])


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """With momentum."""
    return torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)


def plain(case: Case, batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
    """The loop, with nothing around it; the models between its stages, the first and the last."""
    model = case.network()
    optimizer = sgd(model)
    held = [copied(model)]
    for start, stop in case.parts():
        for batch in batches[start:stop]:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
        held.append(copied(model))
    return held


def copied(model: nn.Module) -> dict[str, Tensor]:
    """The parameters as they are."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def record(case: Case, batches: Sequence[Batch], folder: Path) -> tuple[culpa.Run, culpa.Problem]:
    """The same loop, recorded."""
    model = case.network()
    problem, optimizer = culpa.Problem(model, loss), sgd(model)
    with culpa.record(folder, problem, optimizer) as recorder:
        for start, stop in case.parts():
            with recorder.stage(f"stage {start}"):
                for batch in recorder.batches(batches[start:stop]):
                    optimizer.zero_grad()
                    loss(model, batch).backward()
                    optimizer.step()
    return culpa.open_run(folder), problem


def from_checkpoints(
    case: Case, batches: Sequence[Batch], held: Sequence[dict[str, Tensor]]
) -> Callable[[], Any]:
    """Embedding every stage with nothing of the run but the models between its stages."""
    stages = [
        culpa.CheckpointStage(
            f"stage {start}",
            batches[start:stop],
            steps=stop - start,
            learning_rate=RATE,
            momentum=MOMENTUM,
            fresh_optimizer=False,
        )
        for start, stop in case.parts()
    ]
    run, problem = culpa.from_checkpoints(held, stages), culpa.Problem(case.network(), loss)
    return lambda: culpa.embed(run, problem, propagator=culpa.Krylov())


def jobs(case: Case, run: culpa.Run, problem: culpa.Problem) -> dict[str, Callable[[], Any]]:
    """What is asked of a recorded run."""
    return {
        "replay": lambda: culpa.replay(run, problem, without=[0]),
        "attribute": lambda: culpa.attribute(run, problem, case.asked()),
        "embed": lambda: culpa.embed(run, problem, propagator=culpa.Secant(0.25)),
    }


def once(case: Case, folder: Path, krylov: bool = False) -> dict[str, float]:
    """Processor seconds of every part, in turn."""
    batches = case.data()
    took, held = seconds(lambda: plain(case, batches))
    spent = {"plain": took}
    spent["record"], made = seconds(lambda: record(case, batches, folder))
    asked = jobs(case, *made)
    if krylov:
        asked[FROM_CHECKPOINTS] = from_checkpoints(case, batches, held)
    return spent | {name: seconds(job)[0] for name, job in asked.items()}


def examine(case: Case, repeats: int, krylov: bool) -> dict[str, Any]:
    """Medians over rounds: seconds, and ratios to the plain loop of the same round."""
    rounds: list[dict[str, float]] = []
    spent = 0.0
    while len(rounds) < max(1, repeats - int(spent / LONG)):
        with tempfile.TemporaryDirectory() as folder:
            rounds.append(once(case, Path(folder, "run"), krylov and not rounds))
        spent += sum(rounds[-1].values())
    middle = {n: statistics.median(r[n] for r in rounds if n in r) for n in rounds[0]}
    ratios = {
        n: statistics.median(r[n] / r["plain"] for r in rounds if n in r)
        for n in middle
        if n != "plain"
    }
    return {
        **asdict(case),
        "rounds": len(rounds),
        "parameters": case.parameters,
        "seconds": {n: round(s, 5) for n, s in middle.items()},
        "times plain training": {n: round(r, 3) for n, r in ratios.items()},
    }


def room(case: Case, part: str) -> int:
    """Bytes above what is held before one part, in this process."""
    batches = case.data()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "run")
        plain(replace(case, updates=4), batches)
        if part == "plain":
            return peak(lambda: plain(case, batches))
        if part == "record":
            return peak(lambda: record(case, batches, folder))
        return peak(jobs(case, *record(case, batches, folder))[part])


def rooms(case: Case) -> dict[str, Any]:
    """``room`` of every part, each in a process of its own."""
    found = dict[str, int]()
    for part in ("plain", *PARTS):
        command = [sys.executable, __file__, "--room", part, json.dumps(asdict(case))]
        found[part] = int(subprocess.run(command, capture_output=True, check=True).stdout)
    return {**asdict(case), "parameters": case.parameters, "bytes": found}


def main() -> None:
    """Measure, write JSON, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--axes", nargs="*", choices=list(AXES), default=list(AXES))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/growth.json"))
    parser.add_argument("--figure", type=Path, default=Path("docs/results/figures/growth.svg"))
    parser.add_argument("--draw", action="store_true", help="draw again what stands in --out")
    parser.add_argument("--room", nargs=2, metavar=("PART", "CASE"), help="(of this script's own)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.room:
        sys.stdout.write(f"{room(Case(**json.loads(given.room[1])), given.room[0])}\n")
        return
    if not given.draw:
        measure(given.axes, given.repeats, given.out)
    results = json.loads(given.out.read_text(encoding="utf-8"))
    drawn = picture(results, TITLES, (*PARTS, FROM_CHECKPOINTS))
    given.figure.write_text(f"{drawn}\n{mark(given.out)}\n", encoding="utf-8")


def measure(axes: Sequence[str], repeats: int, out: Path) -> None:
    """Everything, written as it comes."""
    results: dict[str, Any] = {
        "what": "processor seconds, and ratios to the plain loop of the same round",
        "machine": machine(),
        "load before": round(os.getloadavg()[0], 2),
        "repeats": repeats,
        "growth": {},
        "memory": [],
    }

    def kept() -> None:
        out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    for _ in range(2):  # what torch loads and tunes at its first use
        with tempfile.TemporaryDirectory() as folder:
            once(SHORT, Path(folder, "run"))
    for axis in axes:
        rows = results["growth"].setdefault(axis, [])
        for case in AXES[axis][1]:
            rows.append(examine(case, repeats, axis == "updates"))
            kept()
            print(axis, rows[-1][axis], rows[-1]["times plain training"], flush=True)
    for case in ROOMS:
        results["memory"].append(rooms(case))
        kept()
        print("memory", case.updates, results["memory"][-1]["bytes"], flush=True)
    results["exponents"] = exponents(results)
    kept()


if __name__ == "__main__":
    main()
