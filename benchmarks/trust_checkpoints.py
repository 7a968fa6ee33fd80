"""Is trust in stage effects from checkpoints alone to be trusted? Grades against retraining.

    python benchmarks/trust_checkpoints.py [--out benchmarks/results/trust_checkpoints.json]

Each run trains on real digits (scikit-learn's) in three stages, turned by 0, 90 and 180 degrees,
and is known to culpa by four checkpoints only. The effect of a stage on the mean log-likelihood of
unseen digits, turned in each of the three ways, is right if it has the sign of retraining without
the stage and lies within 20 % of it. Runs differ in model, scaling of the data, learning rate,
momentum, weight decay and length, from hardly learning to unstable. The last stage, whose embedding
is exact, is left out.

The first half of the runs served to set the bounds in culpa/estimators/trust.py; the quality of the
grades is told by the other half. None is used by the tests.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import culpa

GRADES = ("trusted", "doubtful", "not identified")
UNITS = {"tanh": nn.Tanh, "silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU}
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Setting:
    """One training run by SGD."""

    model: str
    rate: float
    seed: int
    momentum: float = 0.9
    decay: float = 0.0
    nesterov: bool = False
    fresh: bool = True
    scale: float = 1.0
    batch: int = 32
    lengths: tuple[int, int, int] = (40, 20, 20)


BOUNDS = (
    Setting("tanh", 1e-3, 20),
    Setting("tanh", 1e-2, 21),
    Setting("tanh", 1e-1, 22),
    Setting("gelu", 3e-3, 23, scale=2.0),
    Setting("gelu", 3e-2, 24, scale=2.0),
    Setting("gelu", 3e-2, 25, momentum=0.0),
    Setting("silu", 1e-1, 26, momentum=0.0, decay=0.01),
    Setting("silu", 2e-2, 27, fresh=False),
    Setting("relu", 1e-2, 28, lengths=(120, 40, 40)),
    Setting("relu", 5e-2, 29, batch=8),
    Setting("conv", 1e-2, 30),
    Setting("conv", 5e-2, 31, nesterov=True),
)
"""The runs that the bounds were set on."""
QUALITY = (
    Setting("tanh", 3e-3, 40, decay=0.05),
    Setting("tanh", 3e-2, 41, fresh=False),
    Setting("tanh", 3e-1, 42, momentum=0.0),
    Setting("gelu", 1e-2, 43),
    Setting("gelu", 1e-2, 44, scale=2.0, lengths=(100, 60, 60)),
    Setting("gelu", 1e-1, 45),
    Setting("silu", 5e-3, 46, nesterov=True),
    Setting("silu", 5e-2, 47, batch=8, momentum=0.0),
    Setting("relu", 3e-3, 48),
    Setting("relu", 3e-2, 49, scale=2.0),
    Setting("conv", 3e-3, 50, fresh=False),
    Setting("conv", 3e-2, 51, momentum=0.5, lengths=(80, 40, 40)),
)
"""The runs that tell how good the grades are."""


def network(setting: Setting) -> nn.Module:
    """The model of a setting, untrained."""
    torch.manual_seed(setting.seed)
    if setting.model == "conv":
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 8, 3),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(288, 10),
        )
    unit = UNITS[setting.model]
    return nn.Sequential(nn.Linear(64, 48), unit(), nn.Linear(48, 48), unit(), nn.Linear(48, 10))


def digits(setting: Setting) -> tuple[Batch, Batch]:
    """Training and test digits, ``[N, 8, 8]``."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32) / 16 * setting.scale
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    images, labels = images[order], torch.tensor(data.target)[order]
    return (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


def turned(batch: Batch, turns: int) -> Batch:
    """By quarter turns; flattened."""
    return torch.rot90(batch[0], turns, (1, 2)).flatten(1), batch[1]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean cross-entropy."""
    return cross_entropy(model(batch[0]), batch[1])


def train(
    setting: Setting, data: Batch, without: int | None = None
) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """Plain SGD, one stage left out or none; the checkpoints around every stage."""

    def new() -> torch.optim.Optimizer:
        return torch.optim.SGD(
            model.parameters(),
            lr=setting.rate,
            momentum=setting.momentum,
            weight_decay=setting.decay,
            nesterov=setting.nesterov,
        )

    model = network(setting)
    optimizer = new()
    held = [{n: v.clone() for n, v in model.state_dict().items()}]
    for at, length in enumerate(setting.lengths):
        optimizer = new() if setting.fresh else optimizer
        inputs, labels = turned(data, at)
        draw = torch.Generator().manual_seed(100 * setting.seed + at)
        for _ in range(length if at != without else 0):
            rows = torch.randperm(len(labels), generator=draw)[: setting.batch]
            optimizer.zero_grad()
            loss(model, (inputs[rows], labels[rows])).backward()
            optimizer.step()
        held.append({n: v.clone() for n, v in model.state_dict().items()})
    return model, held


def examine(setting: Setting) -> dict[str, Any]:
    """One run: each stage's trust, and for each test set the effect estimated and the true one."""
    data, unseen = digits(setting)
    model, held = train(setting, data)
    stages = [
        culpa.CheckpointStage(
            f"{90 * at} degrees",
            turned(data, at),
            steps=length,
            learning_rate=setting.rate,
            momentum=setting.momentum,
            weight_decay=setting.decay,
            nesterov=setting.nesterov,
            fresh_optimizer=setting.fresh,
        )
        for at, length in enumerate(setting.lengths)
    ]
    run = culpa.from_checkpoints(held, stages)
    asked = [culpa.log_likelihood(f"{90 * at} degrees", turned(unseen, at)) for at in range(3)]
    row: dict[str, Any] = {"run": asdict(setting)}
    try:
        found = culpa.embed(run, culpa.Problem(network(setting), loss))
    except culpa.ProblemError as error:
        return {**row, "refused": str(error)}
    row["likelihoods"] = [round(float(b.values(model).mean()), 3) for b in asked]
    rows: list[dict[str, Any]] = []
    for at in range(2):
        without, _ = train(setting, data, without=at)
        trust = found.trust[stages[at].name]
        pairs = [(found.effect(b)[at], b.values(model) - b.values(without)) for b in asked]
        means = [(float(e.mean()), float(t.mean())) for e, t in pairs]
        rows.append(
            {
                "growth": trust.growth,
                "residual": trust.residual,
                "displacement": trust.displacement,
                "grade": trust.grade,
                "pearson": [culpa.agreement(e, t).pearson for e, t in pairs],
                "estimated": [e for e, _ in means],
                "true": [t for _, t in means],
                "right": [abs(e - t) <= 0.2 * abs(t) for e, t in means],
            }
        )
    return {**row, "stages": rows}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How often the grades of these runs are right."""
    counts = {grade: Counter[str]() for grade in GRADES}
    for row in rows:
        for stage in row.get("stages", []):
            for right in stage["right"]:
                counts[stage["grade"]]["right" if right else "wrong"] += 1
    wrong = sum(c["wrong"] for c in counts.values())
    trusted = counts["trusted"].total()
    return {
        "runs": len(rows),
        "refused": sum("refused" in row for row in rows),
        "effects": sum(c.total() for c in counts.values()),
        "trusted": trusted,
        "trusted_and_right": counts["trusted"]["right"] / trusted if trusted else math.nan,
        "wrong": wrong,
        "wrong_and_flagged": 1 - counts["trusted"]["wrong"] / wrong if wrong else math.nan,
        "by_grade": {grade: dict(counts[grade]) for grade in GRADES},
    }


def main() -> None:
    """Every setting; both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=None)
    out: Path | None = parser.parse_args().out
    torch.set_num_threads(1)
    result: dict[str, Any] = {"machine": platform.machine(), "torch": str(torch.__version__)}
    for name, settings in (("bounds", BOUNDS), ("quality", QUALITY)):
        rows = [examine(setting) for setting in settings]
        for row in rows:
            print(json.dumps(row))
        result[name] = {"summary": summary(rows), "runs": rows}
        print(json.dumps({name: result[name]["summary"]}, indent=1))
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
