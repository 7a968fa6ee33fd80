"""The forecast of every job against the job itself: processor seconds, peak memory, bytes on disk.

    CULPA_DATA=... CULPA_MODELS=... python benchmarks/forecast.py [--cases mlp demo ...]

Each case is recorded, replayed, attributed, embedded and audited, every job in a process of its
own, which says what its peak of resident memory was in the end (``ru_maxrss``: interpreter, torch
and model included) and how much processor time the job itself took. The forecast is made in two
more: of the training as a plan, from its first eight batches, and of the recorded run.

    mlp       784-128-128-10, 300 updates of 64 in three stages, AdamW (random data)
    wide      1024-2048-2048-10 (6.3 M parameters), 120 updates of 64 in three stages, SGD
    demo      ``culpa demo``
    cifar     examples/cifar_resnet.py with 10 updates a stage
    llama     examples/llama_toxicity.py (transformers' Trainer) with 12 updates a stage
    1e5, 1e6, 1e7  adapters on a frozen decoder of so many parameters (parameters.py), recorded with
              ``frozen="reference"``, 40 updates in two stages; also attributed with the options of
              ``hold=``
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import parameters
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import culpa

CASES = ("mlp", "wide", "demo", "cifar", "llama", "1e5", "1e6", "1e7")
JOBS = ("record", "replay", "attribute", "embed", "audit")
HOLDS: dict[str, Any] = {
    "attribute, on disk": culpa.OnDisk(),
    "attribute, bfloat16": culpa.InMemory(dtype=torch.bfloat16),
}
"""Measured where the base is large and frozen."""
EXAMPLES = Path(__file__).parents[1] / "examples"


@dataclass(frozen=True)
class Case:
    """How a case trains, and what it takes to walk its run again or to plan it."""

    train: Callable[[Path], object]
    problem: culpa.Problem
    behaviours: list[culpa.Behaviour]
    plan: culpa.Plan | None


def random_digits(widths: list[int], optimizer: str, updates: int) -> Case:
    """A perceptron on random inputs."""
    torch.manual_seed(0)
    pairs = itertools.pairwise(widths)
    layers = [layer for a, b in pairs for layer in (nn.Linear(a, b), nn.GELU())][:-1]
    model = nn.Sequential(*layers)
    problem = culpa.Problem(model, lambda m, b: cross_entropy(m(b[0]), b[1]))
    made: Any = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD
    stepper = made(model.parameters(), lr=1e-3)
    names = ("first", "second", "third")

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(64, widths[0]), torch.randint(10, (64,))

    def train(folder: Path) -> None:
        with culpa.record(folder, problem, stepper) as recorder:
            for name in names:
                with recorder.stage(name):
                    for one in recorder.batches(batch() for _ in range(updates)):
                        stepper.zero_grad()
                        problem.loss(model, one).backward()
                        stepper.step()

    behaviours = [culpa.log_likelihood(f"points {i}", batch()) for i in range(2)]
    plan = culpa.Plan(problem, stepper, [batch() for _ in range(8)], dict.fromkeys(names, updates))
    return Case(train, problem, behaviours, plan)


def demo() -> Case:
    """The demo."""
    from culpa.experiments import demo

    torch.manual_seed(0)
    problem, behaviours = demo.problem()
    stages, batches, examples = dict[str, int](), list[Any](), 0
    for name, images, labels, epochs in demo._pipeline():
        loader = demo._shuffled(images.flatten(1), labels)
        stages[name] = epochs * len(loader)
        batches += list(itertools.islice(loader, 2))
        examples += len(labels)
    optimizer = demo._optimizer(problem.model, "sgd")
    plan = culpa.Plan(problem, optimizer, batches, stages, examples=examples)
    return Case(demo.train, problem, behaviours, plan)


def example(name: str) -> Any:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def cifar(updates: int = 10) -> Case:
    """ResNet-20."""
    made = example("cifar_resnet")
    data, (inputs, targets) = made.images("train", 2000), made.images("test", 600)
    stages = [made.batches_of(number, data, updates) for number in range(3)]
    pets = (targets == made.CAT) | (targets == made.DOG)
    behaviours = [
        culpa.log_likelihood("cats and dogs", (inputs[pets], targets[pets])),
        culpa.log_likelihood("others", (inputs[~pets][:200], targets[~pets][:200])),
    ]
    problem = culpa.Problem(made.pretrained(), made.loss)
    plan = culpa.Plan(
        problem,
        made.optimizer_of(problem.model),
        stages[0][:8],
        dict.fromkeys(made.STAGES, updates),
    )
    return Case(lambda folder: made.recorded(stages, folder), problem, behaviours, plan)


def llama(updates: int = 12) -> Case:
    """Three Trainers; their batches are made inside of them, so there is no plan."""
    made = example("llama_toxicity")
    from culpa.integrations.transformers import problem_of

    model, place = made.adapted(), Path(tempfile.mkdtemp())
    jobs = {stage: made.trainer_of(stage, model, updates, place) for stage in made.STAGES}
    problem = culpa.Problem.by_stage({stage: problem_of(job) for stage, job in jobs.items()})
    return Case(lambda folder: made.recorded(updates, folder.parent), problem, [made.gap()], None)


def adapters(size: float) -> Case:
    """Low-rank maps beside a frozen decoder."""
    torch.manual_seed(0)
    model = parameters.Decoder(*parameters.SHAPES[size])
    problem = culpa.Problem(model, parameters.loss)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    data = [batch for seed in range(11) for batch in parameters.batches(seed)]
    stages = {"one": 20, "two": 20}
    kept = {"checkpoints": culpa.AtStages(), "frozen": "reference"}

    def train(folder: Path) -> None:
        left = iter(data)
        with culpa.record(folder, problem, optimizer, **kept) as recorder:
            for name, count in stages.items():
                with recorder.stage(name):
                    for batch in recorder.batches(itertools.islice(left, count)):
                        optimizer.zero_grad()
                        problem.loss(model, batch).backward()
                        optimizer.step()

    asked = [culpa.Behaviour("test", parameters.log_likelihoods, data[-1])]
    plan = culpa.Plan(problem, optimizer, data[:8], stages, **kept)
    return Case(train, problem, asked, plan)


MADE: dict[str, Callable[[], Case]] = {
    "mlp": lambda: random_digits([784, 128, 128, 10], "adamw", 100),
    "wide": lambda: random_digits([1024, 2048, 2048, 10], "sgd", 40),
    "demo": demo,
    "cifar": cifar,
    "llama": llama,
    **{f"1e{n}": partial(adapters, 10.0**n) for n in (5, 6, 7)},
}


def child(name: str, job: str, folder: Path) -> dict[str, Any]:
    """One job, in this process."""
    torch.set_num_threads(1)
    case, path = MADE[name](), folder / "run"
    run = None if job in ("record", "plan") else culpa.open_run(path)
    began = time.process_time()
    if job == "plan" and case.plan is None:
        return {"jobs": {}, "refused": {}, "took": 0.0}
    hold = HOLDS.get(job.replace("run", "attribute"))
    if job == "plan" or job.startswith("run"):
        ways: Any = {"clock": time.process_time, "hold": hold}
        told = (
            culpa.forecast(case.plan, behaviours=case.behaviours, **ways)
            if run is None and case.plan is not None
            else culpa.forecast(run, case.problem, case.behaviours, **ways)
        )
        jobs = {
            n: {"seconds": j.seconds, "peak": j.memory, "disk": j.disk}
            for n, j in told.jobs.items()
        }
        return {"jobs": jobs, "refused": told.found.refused, "took": time.process_time() - began}
    work: dict[str, Callable[[], object]] = {
        "record": lambda: case.train(path),
        "replay": lambda: culpa.replay(run, case.problem),  # pyright: ignore[reportArgumentType]
        "attribute": lambda: culpa.attribute(run, case.problem, case.behaviours, hold=hold),  # pyright: ignore[reportArgumentType]
        "embed": lambda: culpa.embed(run, case.problem),  # pyright: ignore[reportArgumentType]
        "audit": lambda: culpa.audit(run, case.problem, case.behaviours),  # pyright: ignore[reportArgumentType]
    }
    work[job.partition(",")[0]]()
    seconds = time.process_time() - began
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    disk = culpa.open_run(path).bytes_on_disk if job == "record" else 0
    return {"seconds": seconds, "peak": peak, "disk": disk}


def apart(name: str, job: str, folder: Path) -> dict[str, Any]:
    """One job, in a process of its own."""
    command = [sys.executable, __file__, "--case", name, "--job", job, "--folder", str(folder)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def off(told: float, true: float) -> str:
    """By how much, in per cent of the truth."""
    return f"{100 * (told / true - 1):+.0f}" if true else "-"


def study(name: str) -> Iterator[str]:
    """The rows of a case, each as soon as its job is done."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        plan = apart(name, "plan", folder)
        record = apart(name, "record", folder)
        told = apart(name, "run", folder)
        yield (
            f"| {name} | the forecasts took | {plan['took']:.1f} and {told['took']:.1f}"
            " | | | | | | |"
        )
        for job in (*JOBS, *(HOLDS if name.startswith(("1e", "wide")) else ())):
            told = apart(name, job.replace("attribute", "run"), folder) if job in HOLDS else told
            true = record if job == "record" else apart(name, job, folder)
            cells = [name, job, f"{true['seconds']:.2f}", f"{true['peak'] / 1e6:.0f}"]
            early = plan["jobs"].get(job)
            for forecast in (early, told["jobs"].get(job.partition(",")[0])):
                cells += (
                    ["-", "-"]
                    if forecast is None
                    else [off(forecast[what], true[what]) for what in ("seconds", "peak")]
                )
            disk = plan["jobs"].get(job, {"disk": 0})["disk"]
            cells.append(f"{true['disk'] / 1e6:.2f} ({off(disk, true['disk'])})" if disk else "-")
            yield f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the rows, or one job's outcome."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="*", default=CASES)
    parser.add_argument("--case")
    parser.add_argument("--job", default="")
    parser.add_argument("--folder", type=Path, default=Path())
    given = parser.parse_args()
    if given.case:
        print(json.dumps(child(given.case, given.job, given.folder)))
        return
    for name in given.cases:
        for row in study(name):
            print(row, flush=True)


if __name__ == "__main__":
    main()
