"""Replays of an audit side by side: wall time by the number of worker processes.

    python benchmarks/fanout.py [--updates 32] [--repeats 2] [--out benchmarks/results/fanout.json]

A ResNet-20 on noise in eight stages is recorded, and history is replayed without each of the
first four: the tasks an audit hands to its executor. Once in this process, then by
``culpa.Processes`` with one worker and with two, one thread each; the workers' start-up (torch, the
model, opening the run) is told apart by running all tasks again with the same, warm workers. Wall
time, so it means something on a machine without other work only: there it takes three to four
minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import culpa
from culpa.auditing.tasks import Bench, Outcome, Task
from culpa.experiments.resnet import resnet
from culpa.trajectory import environment

STAGES, JUDGED, BATCH = 8, 4, 32


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise of 32 x 32 in ten classes."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 3, 32, 32, generator=generator)
    return inputs, torch.randint(10, (count,), generator=generator)


def make() -> tuple[culpa.Problem, list[culpa.Behaviour]]:
    """The problem and its behaviour, as every worker builds them."""
    torch.set_num_threads(1)
    model = resnet("resnet20", 10, 0)
    return culpa.Problem(model, loss), [culpa.log_likelihood("noise", images(50, 99))]


def record(path: Path, updates: int) -> culpa.Run:
    """The run of which history is replayed."""
    problem, _ = make()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.01, momentum=0.9)
    each = updates // STAGES
    with culpa.record(path, problem, optimizer) as recorder:
        for stage in range(STAGES):
            inputs, targets = images(each * BATCH, stage)
            batches = list(zip(inputs.split(BATCH), targets.split(BATCH), strict=True))
            with recorder.stage(f"stage {stage}"):
                for batch in recorder.batches(batches):
                    optimizer.zero_grad()
                    loss(problem.model, batch).backward()
                    optimizer.step()
    return culpa.open_run(path)


def timed(work: Callable[[], object]) -> float:
    """Wall seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measured(run: culpa.Run) -> dict[str, float]:
    """Seconds of the same tasks, one way and the other."""
    problem, behaviours = make()
    bench = Bench(run, problem, behaviours, counterfactual="skip", allow_drift=False, progress=None)
    tasks = [Task(start=s.start, stop=s.stop) for s in run.stages[:JUDGED]]
    found: dict[str, Sequence[Outcome]] = {}
    seconds = {"here": timed(lambda: found.update(here=list(map(bench, tasks))))}
    for workers in (1, 2):
        with culpa.Processes(make, workers) as processes:

            def once(processes: culpa.Processes = processes) -> None:
                found["there"] = list(processes.map(bench, tasks))

            seconds[f"{workers} cold"] = timed(once)
            seconds[f"{workers} warm"] = timed(once)
        effects = [[o.effects for o in found[where]] for where in ("here", "there")]
        assert effects[0] == effects[1], "workers found other effects"
    return seconds


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--updates", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fanout.json"))
    given = parser.parse_args()
    if given.updates < STAGES:
        parser.error(f"--updates is at least one for each of {STAGES} stages; got {given.updates}")
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="culpa-bench-") as folder:
        run = record(Path(folder, "run"), given.updates)
        rounds = [measured(run) for _ in range(given.repeats)]
    found = {
        "what": f"{JUDGED} replays of a ResNet-20, wall time relative to one process",
        "culpa": culpa.__version__,
        "machine": {**environment.capture(()), "cores": str(os.cpu_count())},
        "load before": round(load, 2),
        "repeats": given.repeats,
        "updates": given.updates,
        "seconds_here": statistics.median(r["here"] for r in rounds),
        "ratios": {
            name: statistics.median(r[name] / r["here"] for r in rounds)
            for name in rounds[0]
            if name != "here"
        },
    }
    print(json.dumps(found, indent=1))
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
