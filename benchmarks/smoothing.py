"""Smoothing over perturbed trajectories, where single sweeps explode and where not.

    python benchmarks/smoothing.py [--out benchmarks/results/smoothing.json]

A 784-64-64-10 GELU network on 2,000 standardised MNIST images, AdamW, 100 updates of 50 images.
Each update's score on the mean log-likelihood of 500 test images is held against skipping that
update and training on. The defaults of culpa.Smoothing were chosen on runs of seeds 0 to 2 (and on
one of the raw images at rate 1e-2); these have other seeds. Reads mnist.npz as stages.py does.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from stages import mnist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import culpa
from culpa.estimators.smoothing import Smoothing

UPDATES, BATCH = 100, 50
RUNS = ((1e-3, 10), (3e-3, 10), (3e-3, 11))
WAYS: dict[str, dict[str, Any]] = {
    "default": {},
    "default, smoothed": {"smoothing": Smoothing()},
    "Exact": {"propagator": culpa.Exact()},
    "Exact, smoothed": {"propagator": culpa.Exact(), "smoothing": Smoothing()},
    "GaussNewton": {"propagator": culpa.GaussNewton()},
    "GaussNewton, smoothed": {"propagator": culpa.GaussNewton(), "smoothing": Smoothing()},
}


def share(of: Tensor) -> float:
    """The part that is true; nan of nothing."""
    return round(float(of.double().mean()), 3)


def examine(rate: float, seed: int, folder: Path) -> dict[str, Any]:
    """Train, record, replay without each update, and score in every way."""
    images, labels, test, answers = mnist()
    images, test = ((part.flatten(1) - 0.1307) / 0.3081 for part in (images, test))
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(784, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10)
    )
    problem = culpa.Problem(model, lambda m, b: cross_entropy(m(b[0]), b[1]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    rows = torch.cat([torch.randperm(len(labels)) for _ in range(3)]).split(BATCH)[:UPDATES]
    with culpa.record(folder, problem, optimizer) as recorder:
        for batch in recorder.batches([(images[r], labels[r]) for r in rows]):
            optimizer.zero_grad()
            problem.loss(model, batch).backward()
            optimizer.step()
    run = culpa.open_run(folder)
    asked = culpa.log_likelihood("log-likelihood of test digits", (test, answers))
    truth = torch.stack(
        [culpa.replay(run, problem, without=[k]).effect(asked).mean() for k in range(UPDATES)]
    )
    ways: dict[str, Any] = {}
    for name, options in WAYS.items():
        scores = culpa.attribute(run, problem, [asked], **options)
        estimate = scores.steps[:, 0]
        found = culpa.agreement(estimate, truth)
        ways[name] = {
            "pearson": round(found.pearson, 3),
            "sign": round(found.sign, 3),
            "relative_error": round(found.relative_error, 3),
            "growth": round(max(t.growth for t in scores.trust), 1),
            "fallback": scores.fallback,
        }
        if scores.spread is not None:
            spread = scores.spread[:, 0]
            clear, same = estimate.abs() > 2 * spread, estimate.sign() == truth.sign()
            ways[name] |= {
                "within two spreads": share((estimate - truth).abs() <= 2 * spread),
                "beyond two spreads of zero": int(clear.sum()),
                "sign of those": share(same[clear]),
                "sign of the others": share(same[~clear]),
            }
    return {"rate": rate, "seed": seed, "accuracy": share(model(test).argmax(1) == answers)} | ways


def main() -> None:
    """Every run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=None)
    out: Path | None = parser.parse_args().out
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for rate, seed in RUNS:
            found.append(examine(rate, seed, Path(folder) / f"{rate}-{seed}"))
            print(json.dumps(found[-1]), flush=True)
            if out is not None:
                out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
