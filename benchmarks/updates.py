"""How well do the scores of single updates agree with leaving each out? AdamW, three rates.

    python benchmarks/updates.py [--seeds 2] [--out benchmarks/results/updates.json]

A 784-64-64-10 GELU network on 2,000 MNIST images, AdamW, 100 updates of 50 images, pixels in [0, 1]
or standardised. Each update's score for the mean log-likelihood of 500 test images, by the defaults
of ``culpa.attribute`` and with ``order=2``, is held against skipping that update and training on
in a plain loop of torch. Reads mnist.npz as stages.py does.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from stages import mnist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import culpa

UPDATES, BATCH = 100, 50
GRADES = ("trusted", "doubtful", "not identified")
RATES = (3e-4, 1e-3, 3e-3)
INPUTS = {"in [0, 1]": (0.0, 1.0), "standardised": (0.1307, 0.3081)}
WAYS: dict[str, dict[str, Any]] = {"default": {}, "order 2": {"order": 2}}


def started(rate: float, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The network and its optimizer before the first update."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(784, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10)
    )
    return model, torch.optim.AdamW(model.parameters(), lr=rate)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[tuple[Tensor, Tensor]]
) -> None:
    """A plain loop."""
    for inputs, targets in batches:
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def likelihood(model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """The mean over test images."""
    with torch.no_grad():
        return -float(cross_entropy(model(inputs).double(), targets))


def examine(inputs: str, rate: float, seed: int, folder: Path) -> dict[str, Any]:
    """Record, score, and train again without each update."""
    images, labels, test, answers = mnist()
    mean, deviation = INPUTS[inputs]
    images, test = ((part.flatten(1) - mean) / deviation for part in (images, test))
    model, optimizer = started(rate, seed)
    problem = culpa.Problem(model, lambda m, b: cross_entropy(m(b[0]), b[1]))
    order = torch.cat([torch.randperm(len(labels)) for _ in range(3)]).split(BATCH)[:UPDATES]
    batches = [(images[rows], labels[rows]) for rows in order]
    with culpa.record(folder, problem, optimizer) as recorder:
        train(model, optimizer, recorder.batches(batches))
    whole, truth = likelihood(model, test, answers), list[float]()
    for k in range(UPDATES):
        other, its = started(rate, seed)
        train(other, its, batches[:k] + batches[k + 1 :])
        truth.append(whole - likelihood(other, test, answers))
    run = culpa.open_run(folder)
    asked = culpa.log_likelihood("log-likelihood of test digits", (test, answers))
    row: dict[str, Any] = {"inputs": inputs, "rate": rate, "seed": seed, "ways": {}}
    row["accuracy"] = round(float((model(test).argmax(1) == answers).double().mean()), 3)
    for name, options in WAYS.items():
        scores = culpa.attribute(run, problem, [asked], **options)
        row["ways"][name] = summary(scores, torch.tensor(truth, dtype=torch.float64))
    return row


def summary(scores: culpa.Scores, truth: Tensor) -> dict[str, Any]:
    """How well one way agrees, over all updates and over those that it grades trusted."""
    estimate = scores.steps[:, 0]
    trusted = torch.tensor([t.grade == "trusted" for t in scores.trust])
    over = {"all": torch.ones(UPDATES, dtype=torch.bool), "trusted": trusted}
    found: dict[str, Any] = {
        "growth": round(max(t.growth for t in scores.trust), 2),
        "fallback": scores.fallback,
        "grades": {g: sum(t.grade == g for t in scores.trust) for g in GRADES},
    }
    for name, mask in over.items():
        if int(mask.sum()) >= 3:
            agreement = culpa.agreement(estimate[mask], truth[mask])
            found[name] = {
                "updates": int(mask.sum()),
                "pearson": round(agreement.pearson, 3),
                "sign": round(agreement.sign, 3),
            }
    return found


def main() -> None:
    """Every run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for inputs in INPUTS:
            for rate in RATES:
                for seed in range(given.seeds):
                    where = Path(folder) / f"{len(found)}"
                    found.append(examine(inputs, rate, seed, where))
                    print(json.dumps(found[-1]), flush=True)
                    if given.out is not None:
                        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
