"""What do ten stages cost together? ``Secant(0.25)`` against ten replays, and how well it agrees.

    python benchmarks/ten_stages.py [--repeats 3] [--out benchmarks/results/ten_stages.json]

2,000 MNIST images, batch 100, SGD with momentum .9, ten stages of 20 updates each, turned by 0, 9,
... 81 degrees, and three networks: the 784-128-128-10 ReLU network of the other tables, one with
512 units instead of 128, and a convolutional one, which has fewer parameters and more arithmetic.

Embedding is compared with two things: ten calls of ``culpa.replay``, which begin at the removed
stage, and ten retrainings from scratch by a plain loop over batches in memory, without culpa (one
is timed and counted ten times). All run in turn in one process, ``--repeats`` times, and their
processor time is compared (one thread; the machine may be shared); the medians of the ratios are
reported, and the same in gradients of a whole batch, a fraction of its rows counting as that
fraction. Also timed: one gradient on a quarter of the rows and on all of them, by plain torch.

Pearson correlation with true retraining over 500 test images, mean over test sets at 0, 45 and 90
degrees. Reads mnist.npz from the folder that the variable CULPA_DATA names, else beside the
checkout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from stages import BATCH, mnist, turned
from torch import nn
from torch.nn.functional import cross_entropy

import culpa

SETTINGS = (("mlp", 0.003), ("mlp", 0.01), ("wide", 0.003), ("conv", 0.003), ("conv", 0.01))
FRACTION, PROBES = 0.25, 6
STAGES = tuple((f"{9 * i} degrees", 9.0 * i) for i in range(10))


def network(kind: str) -> nn.Module:
    """784 pixels to ten classes."""
    torch.manual_seed(0)
    if kind != "conv":
        width = 512 if kind == "wide" else 128
        return nn.Sequential(
            nn.Linear(784, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 10),
        )
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 8, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(784, 10),
    )


def train(kind: str, rate: float, folder: Path) -> tuple[culpa.Run, culpa.Problem]:
    """Record the run."""
    images, labels, _, _ = mnist()
    model = network(kind)
    problem = culpa.Problem(model, lambda m, b: cross_entropy(m(b[0]), b[1]))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    with culpa.record(folder, problem, optimizer) as recorder:
        for name, degrees in STAGES:
            data = torch.utils.data.TensorDataset(turned(images, degrees), labels)
            loader = torch.utils.data.DataLoader(data, batch_size=BATCH, shuffle=True)
            with recorder.stage(name):
                for batch in recorder.batches(loader):
                    optimizer.zero_grad()
                    problem.loss(model, batch).backward()
                    optimizer.step()
    return culpa.open_run(folder), problem


def in_gradients(run: culpa.Run) -> dict[str, float]:
    """What each way costs, in gradients of a whole batch."""
    total = run.num_steps
    behind = sum(total - stage.stop for stage in run.stages)
    embedding = total + FRACTION * (behind + total - run.stages[0].stop)
    embedding += sum(min(PROBES, total - stage.stop) for stage in run.stages)
    retraining = sum(total - len(stage) for stage in run.stages)
    return {"replays": embedding / behind, "retrainings": embedding / retraining}


def retraining_seconds(kind: str, rate: float, stage: int) -> float:
    """A plain loop without one stage, once."""
    images, labels, _, _ = mnist()
    model = network(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    seconds = 0.0
    for at, (_, degrees) in enumerate(STAGES):
        if at == stage:
            continue
        parts = list(zip(turned(images, degrees).split(BATCH), labels.split(BATCH), strict=True))
        began = time.process_time()
        for inputs, targets in parts:
            optimizer.zero_grad()
            cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        seconds += time.process_time() - began
    return seconds


def quarter_of_a_gradient(kind: str) -> float:
    """The time of a gradient on a fraction of the rows, over that on all: the least of ten."""
    images, labels, _, _ = mnist()
    images, model, least = turned(images, 0.0), network(kind), dict[int, float]()
    for _ in range(10):
        for rows in (int(FRACTION * BATCH), BATCH):
            began = time.process_time()
            for _ in range(20):
                model.zero_grad()
                cross_entropy(model(images[:rows]), labels[:rows]).backward()
            seconds = time.process_time() - began
            least[rows] = min(seconds, least.get(rows, seconds))
    return least[int(FRACTION * BATCH)] / least[BATCH]


def examine(kind: str, rate: float, repeats: int, folder: Path) -> dict[str, Any]:
    """Ratio of the costs, and the correlations of one run."""
    run, problem = train(kind, rate, folder)
    ratios: dict[str, list[float]] = {"replays": [], "retrainings": []}
    found, without = None, []
    for repeat in range(repeats):
        began = time.process_time()
        found = culpa.embed(run, problem, propagator=culpa.Secant(FRACTION))
        embedded = time.process_time()
        without = [culpa.replay(run, problem, without=stage.name) for stage in run.stages]
        replayed = time.process_time()
        ratios["replays"].append((embedded - began) / (replayed - embedded))
        scratch = len(STAGES) * retraining_seconds(kind, rate, repeat)
        ratios["retrainings"].append((embedded - began) / scratch)
    assert found is not None
    _, _, test, answers = mnist()
    asked = [culpa.log_likelihood(f"{d}", (turned(test, d), answers)) for d in (0.0, 45.0, 90.0)]
    effects = [found.effect(b) for b in asked]
    pearson = [
        statistics.mean(
            culpa.agreement(e[i], c.effect(b)).pearson for e, b in zip(effects, asked, strict=True)
        )
        for i, c in enumerate(without)
    ]
    return {
        "network": kind,
        "rate": rate,
        "in_time": {over: statistics.median(r) for over, r in ratios.items()},
        "ratios": ratios,
        "in_gradients": in_gradients(run),
        "quarter_of_a_gradient_in_time": quarter_of_a_gradient(kind),
        "pearson": pearson,
        "grades": [found.trust[s.name].grade for s in run.stages],
    }


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/ten_stages.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    for kind, rate in SETTINGS:
        with tempfile.TemporaryDirectory() as folder:
            results.append(examine(kind, rate, given.repeats, Path(folder) / "run"))
        print(json.dumps(results[-1]))
    if given.out:
        given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
