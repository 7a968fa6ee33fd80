"""How well do stage effects agree with retraining? Three rotated stages of MNIST, four rates.

    python benchmarks/stages.py [--seeds 2] [--out benchmarks/results/stages.json]

DESIGN's setting: a 784-128-128-10 ReLU network, 2,000 images, batch 100, momentum .9, stages of 60
(0 degrees), 20 (45) and 20 (90) updates; Pearson correlation with true retraining over 500 test
images, mean over three test sets (0, 45, 90 degrees). Reads mnist.npz from the folder that the
variable CULPA_DATA names, else beside the checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

import culpa

RATES = (0.001, 0.003, 0.01, 0.03)
STAGES = (("0 degrees", 0.0, 3), ("45 degrees", 45.0, 1), ("90 degrees", 90.0, 1))
BATCH, TRAIN, TEST = 100, 2000, 500
PROPAGATORS: dict[str, Any] = {
    "block, observed": culpa.Exact(),
    "block, midpoint": culpa.Exact(at="midpoint"),
    "block, two Gauss points (default)": culpa.Exact(at="gauss"),
    "Gauss-Newton": culpa.GaussNewton(),
    "layer-wise": culpa.LayerWise(),
    "Secant(0.25)": culpa.Secant(0.25),
    "Secant(1)": culpa.Secant(1.0),
}


def mnist() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images [2000, 1, 28, 28] and labels, test images and labels."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("CULPA_DATA", beside))
    with np.load(folder / "mnist.npz") as data:
        parts = [
            data["x_train"][:TRAIN],
            data["y_train"][:TRAIN],
            data["x_test"][:TEST],
            data["y_test"][:TEST],
        ]
    images = [torch.tensor(p).float().unsqueeze(1) / 255 for p in parts[::2]]
    labels = [torch.tensor(p).long() for p in parts[1::2]]
    return images[0], labels[0], images[1], labels[1]


def turned(images: Tensor, degrees: float) -> Tensor:
    """Rotated about the centre, bilinear; flattened."""
    angle = torch.tensor(degrees * torch.pi / 180)
    rotation = torch.tensor([[angle.cos(), -angle.sin(), 0.0], [angle.sin(), angle.cos(), 0.0]])
    grid = affine_grid(rotation.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return grid_sample(images, grid, align_corners=False).flatten(1)


def examine(rate: float, seed: int, folder: Path) -> dict[str, Any]:
    """One run: correlations [stage] per estimator, mean over the three test sets."""
    train, labels, test, answers = mnist()
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    problem = culpa.Problem(model, lambda m, b: cross_entropy(m(b[0]), b[1]))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    began = time.perf_counter()
    with culpa.record(folder, problem, optimizer) as recorder:
        for name, degrees, epochs in STAGES:
            data = torch.utils.data.TensorDataset(turned(train, degrees), labels)
            loader = torch.utils.data.DataLoader(data, batch_size=BATCH, shuffle=True)
            with recorder.stage(name):
                for _ in range(epochs):
                    for batch in recorder.batches(loader):
                        optimizer.zero_grad()
                        problem.loss(model, batch).backward()
                        optimizer.step()
    training = time.perf_counter() - began
    run = culpa.open_run(folder)
    asked = [culpa.log_likelihood(name, (turned(test, d), answers)) for name, d, _ in STAGES]
    without = [culpa.replay(run, problem, without=stage.name) for stage in run.stages]
    truth = [[c.effect(b) for b in asked] for c in without]
    accuracy = float((model(turned(test, 0.0)).argmax(1) == answers).float().mean())
    rows: dict[str, Any] = {}

    def note(label: str, found: culpa.StageEmbeddings, seconds: float, linear: bool) -> None:
        values = [found.score(b) if linear else found.effect(b) for b in asked]
        by_set = [
            [culpa.agreement(v[i], t).pearson for v, t in zip(values, truth[i], strict=True)]
            for i in range(len(STAGES))
        ]
        rows[label] = {
            "pearson": [float(np.mean(row)) for row in by_set],
            "by_test_set": by_set,
            "grades": [found.trust[s.name].grade for s in run.stages],
            "trainings": seconds / training,
        }

    began = time.perf_counter()
    paper = culpa.embed(run, problem, propagator=culpa.Exact(), form="additive")
    note("additive, linear (the paper)", paper, time.perf_counter() - began, linear=True)
    for label, propagator in PROPAGATORS.items():
        began = time.perf_counter()
        found = culpa.embed(run, problem, propagator=propagator)
        note(label, found, time.perf_counter() - began, linear=False)
    return {"rate": rate, "seed": seed, "accuracy": accuracy, "estimators": rows}


def main() -> None:
    """Every rate and seed; the table on standard output."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for rate in RATES:
            for seed in range(options.seeds):
                found.append(examine(rate, seed, Path(folder) / f"{rate}-{seed}"))
            mine = [f for f in found if f["rate"] == rate]
            print(f"rate {rate:g}, accuracy {np.mean([f['accuracy'] for f in mine]):.2f}")
            for label in mine[0]["estimators"]:
                rows = [f["estimators"][label] for f in mine]
                mean = np.mean([r["pearson"] for r in rows], axis=0)
                spent = np.mean([r["trainings"] for r in rows])
                shown = " ".join(f"{x:6.3f}" for x in mean)
                least = np.mean([r["by_test_set"] for r in rows], axis=0).min()
                print(
                    f"  {label:30s} {shown}   least {least:.4f}   {spent:5.1f} trainings  "
                    f" {rows[0]['grades']}"
                )
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
