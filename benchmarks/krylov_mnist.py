"""How well do effects from stage checkpoints alone agree with retraining? DESIGN's last column.

    python benchmarks/krylov_mnist.py [--seeds 2] [--out benchmarks/results/krylov_mnist.json]

The setting of stages.py (rotated MNIST, 60 / 20 / 20 updates), with inputs as they are and
standardised, with a new optimizer for every stage and with one for all; and runs ten times as
long, with as many segments and four times as many. Truth is retraining without the stage, in plain
torch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stages import BATCH, STAGES, TRAIN, mnist, turned
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import culpa

RATES = (0.001, 0.003, 0.01)
Batch = tuple[Tensor, Tensor]


def network(seed: int) -> nn.Sequential:
    """The network of stages.py."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean cross-entropy."""
    return cross_entropy(model(batch[0]), batch[1])


def train(
    data: list[Batch], rate: float, seed: int, fresh: bool, longer: int, without: int | None = None
) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """Plain SGD, one stage left out or none; the checkpoints around every stage."""
    model = network(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    held = [{n: v.clone() for n, v in model.state_dict().items()}]
    for at, ((inputs, targets), (_, _, epochs)) in enumerate(zip(data, STAGES, strict=True)):
        if fresh:
            optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        order = torch.Generator().manual_seed(1000 * seed + at)
        for _ in range(epochs * longer if at != without else 0):
            for rows in torch.randperm(TRAIN, generator=order).split(BATCH):
                optimizer.zero_grad()
                loss(model, (inputs[rows], targets[rows])).backward()
                optimizer.step()
        held.append({n: v.clone() for n, v in model.state_dict().items()})
    return model, held


def examine(
    rate: float, seed: int, fresh: bool, scaled: bool, longer: int, krylov: culpa.Krylov
) -> dict[str, Any]:
    """One run: correlations [stage] with retraining, mean over the three test sets."""
    images, labels, test, answers = mnist()
    shift, size = (0.1307, 0.3081) if scaled else (0.0, 1.0)
    data = [((turned(images, d) - shift) / size, labels) for _, d, _ in STAGES]
    asked = [
        culpa.log_likelihood(name, ((turned(test, d) - shift) / size, answers))
        for name, d, _ in STAGES
    ]
    began = time.perf_counter()
    model, held = train(data, rate, seed, fresh, longer)
    training = time.perf_counter() - began
    stages = [
        culpa.CheckpointStage(
            name,
            batch,
            steps=epochs * longer * (TRAIN // BATCH),
            learning_rate=rate,
            momentum=0.9,
            fresh_optimizer=fresh,
        )
        for batch, (name, _, epochs) in zip(data, STAGES, strict=True)
    ]
    run = culpa.from_checkpoints(held, stages)
    began = time.perf_counter()
    row: dict[str, Any] = {
        "rate": rate,
        "seed": seed,
        "fresh optimizers": fresh,
        "standardised": scaled,
        "updates": run.num_steps,
        "rank": krylov.rank,
        "segments": krylov.segments,
    }
    try:
        found = culpa.embed(run, culpa.Problem(network(99), loss), propagator=krylov)
    except culpa.ProblemError as error:
        return {**row, "refused": str(error)}
    seconds = time.perf_counter() - began
    pearson: list[float] = []
    for at in range(len(STAGES)):
        without, _ = train(data, rate, seed, fresh, longer, without=at)
        each = [
            culpa.agreement(found.effect(b)[at], b.values(model) - b.values(without)).pearson
            for b in asked
        ]
        pearson.append(float(np.mean(each)))
    trust = [found.trust[name] for name, _, _ in STAGES]
    return {
        **row,
        "probability of the right class": [float(b.values(model).exp().mean()) for b in asked],
        "pearson": pearson,
        "growth": [t.growth for t in trust],
        "residual": [t.residual if t.residual == t.residual else None for t in trust],
        "grades": [t.grade for t in trust],
        "trainings": seconds / training,
    }


def main() -> None:
    """Every setting; the table on standard output."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    usual, more = culpa.Krylov(), culpa.Krylov(3, segments=32)
    cases = [(*case, 1, usual) for case in itertools.product((True, False), (True, False), RATES)]
    cases += [(True, True, rate, 10, krylov) for rate in RATES[:2] for krylov in (usual, more)]
    for scaled, fresh, rate, longer, krylov in cases:
        for seed in range(options.seeds if longer == 1 else 1):
            one = examine(rate, seed, fresh, scaled, longer, krylov)
            found.append(one)
            shown = one.get("refused", "")[:60]
            if not shown:
                shown = " ".join(f"{x:6.4f}" for x in one["pearson"])
                shown += f"  {one['trainings']:5.1f} trainings  {one['grades']}"
            print(
                f"{'standardised' if scaled else 'raw':12s} {'fresh' if fresh else 'carried':8s}"
                f" rate {rate:g} seed {seed} {one['updates']:4d} updates,"
                f" {krylov.segments} segments: {shown}",
                flush=True,
            )
            if options.out is not None:
                options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
