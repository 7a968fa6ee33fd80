"""What do ten stages cost together? ``Secant(0.25)`` against ten replays, and how well it agrees.

    python benchmarks/ten_stages.py [--repeats 3] [--out benchmarks/results/ten_stages.json]

2,000 MNIST images, batch 100, SGD with momentum .9, ten stages of 20 updates each, turned by 0, 9,
... 81 degrees, and two networks: the 784-128-128-10 ReLU network of the other tables, and a
convolutional one, which has fewer parameters and more arithmetic. Both sides run in turn in one
process, ``--repeats`` times, and their processor time is compared (one thread; the machine may be
shared); the median of the ratios is reported. Pearson correlation with true retraining over 500
test images, mean over test sets at 0, 45 and 90 degrees. Reads mnist.npz from the folder that the
variable CULPA_DATA names, else beside the checkout.
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

SETTINGS = (("mlp", 0.003), ("mlp", 0.01), ("conv", 0.01))
STAGES = tuple((f"{9 * i} degrees", 9.0 * i) for i in range(10))


def network(kind: str) -> nn.Module:
    """784 pixels to ten classes."""
    torch.manual_seed(0)
    if kind == "mlp":
        return nn.Sequential(
            nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
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


def examine(kind: str, rate: float, repeats: int, folder: Path) -> dict[str, Any]:
    """Ratio of the costs, and the correlations of one run."""
    run, problem = train(kind, rate, folder)
    ratios: list[float] = []
    found, without = None, []
    for _ in range(repeats):
        began = time.process_time()
        found = culpa.embed(run, problem, propagator=culpa.Secant(0.25))
        embedded = time.process_time()
        without = [culpa.replay(run, problem, without=stage.name) for stage in run.stages]
        ratios.append((embedded - began) / (time.process_time() - embedded))
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
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "pearson": pearson,
        "grades": [found.trust[s.name].grade for s in run.stages],
    }


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
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
