"""Where does the second order help, and where does it diverge? Three rotated stages of MNIST.

    python benchmarks/order2.py [--seeds 2] [--out benchmarks/results/order2.json]
                                [--page docs/results/order2.md]

The runs of benchmarks/stages.py, at four learning rates: the correlation of the estimated effects
of stages with true retraining over 500 test images, and the relative error of the displacement
theta_K - theta_K(without the stage) itself, which has no behaviour to hide behind.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stages import BATCH, RATES, STAGES, mnist, turned
from torch import nn
from torch.nn.functional import cross_entropy

import culpa

ESTIMATORS: dict[str, dict[str, Any]] = {
    "additive (the paper)": {"propagator": culpa.Exact(), "form": "additive"},
    "block, order 1, observed": {"propagator": culpa.Exact()},
    "block, order 2, observed": {"order": 2},
    "block, midpoint": {"propagator": culpa.Exact(at="midpoint")},
    "block, two Gauss points": {"propagator": culpa.Exact(at="gauss")},
}
NAMES = ("GELU", "ReLU")


def train(rate: float, seed: int, activation: str, folder: Path) -> tuple[Any, Any]:
    """Record the three stages; the run and its problem."""
    images, labels, _, _ = mnist()
    torch.manual_seed(seed)
    layer = getattr(nn, activation)
    model = nn.Sequential(
        nn.Linear(784, 128), layer(), nn.Linear(128, 128), layer(), nn.Linear(128, 10)
    )
    problem = culpa.Problem(model, lambda m, b: cross_entropy(m(b[0]), b[1]))
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    with culpa.record(folder, problem, optimizer) as recorder:
        for name, degrees, epochs in STAGES:
            data = torch.utils.data.TensorDataset(turned(images, degrees), labels)
            loader = torch.utils.data.DataLoader(data, batch_size=BATCH, shuffle=True)
            with recorder.stage(name):
                for _ in range(epochs):
                    for batch in recorder.batches(loader):
                        optimizer.zero_grad()
                        problem.loss(model, batch).backward()
                        optimizer.step()
    return culpa.open_run(folder), problem


def flat(tree: dict[str, torch.Tensor], names: list[str]) -> torch.Tensor:
    """The tensors of these names as one float64 vector."""
    return torch.cat([tree[n].double().reshape(-1) for n in names])


def correlation(estimate: Any, asked: list[culpa.Behaviour], truth: torch.Tensor) -> float:
    """The mean over behaviours of the correlation with the truth; nan if there is no estimate."""
    try:
        pairs = zip([estimate(b)[0] for b in asked], truth, strict=True)
        return float(np.mean([culpa.agreement(v, t).pearson for v, t in pairs]))
    except culpa.CulpaError:  # the displacement diverged: there is nothing to compare
        return float("nan")


def examine(rate: float, seed: int, activation: str, folder: Path) -> dict[str, Any]:
    """One run: per estimator and stage the mean correlations and the displacement's error."""
    run, problem = train(rate, seed, activation, folder)
    _, _, test, answers = mnist()
    asked = [culpa.log_likelihood(name, (turned(test, d), answers)) for name, d, _ in STAGES]
    without = [culpa.replay(run, problem, without=stage.name) for stage in run.stages]
    truth = [torch.stack([c.effect(b) for b in asked]) for c in without]
    end, names = run.final_state(), list(run.final_state())
    moved = [flat(end, names) - flat(c.state, names) for c in without]
    rows: dict[str, Any] = {}
    for label, options in ESTIMATORS.items():
        row: dict[str, Any] = {"displacement": [], "effect": [], "score": []}
        for stage, true, way in zip(run.stages[:-1], truth, moved, strict=False):
            found = culpa.embed(run, problem, stages=[stage.name], **options)
            gap = flat(found[stage.name], names) - way
            row["displacement"].append(float(gap.norm() / way.norm()))
            row["effect"].append(correlation(found.effect, asked, true))
            row["score"].append(correlation(found.score, asked, true))
            row["strategy"] = found.facts["strategy"]
        rows[label] = row
    return {"rate": rate, "seed": seed, "activation": activation, "estimators": rows}


def shown(value: float, digits: int) -> str:
    """A number for the page."""
    if not math.isfinite(value):
        return "diverged"
    return f"{value:.{digits}f}" if value < 1e3 else f"{value:.0e}"


def page(found: list[dict[str, Any]], seeds: int) -> str:
    """The results as a page of Markdown."""
    parts = [
        "# The second order: where it helps and where it diverges\n",
        "Three rotated stages of MNIST as in [stages.md](stages.md), with GELU and with ReLU."
        " Each cell: the relative error of the displacement of stage 1 / stage 2 (the last stage is"
        " exact in the block form); then, for the same stages, the Pearson correlation with"
        " retraining over 500 test images, mean over three test sets, of `effect` (exact in the"
        " behaviour) and of `score` (gradient of the behaviour; with the Hessian at order 2)."
        f" Mean over {seeds} seed{'s' if seeds > 1 else ''}. Made by `python benchmarks/order2.py"
        f" --seeds {seeds}`, one thread, torch {torch.__version__.partition('+')[0]}.\n",
    ]
    for activation in NAMES:
        parts.append(f"## {activation}\n")
        parts.append("| estimator | " + " | ".join(f"lr {r:g}" for r in RATES) + " |")
        parts.append("|---" * (len(RATES) + 1) + "|")
        for label in ESTIMATORS:
            cells: list[str] = []
            for rate in RATES:
                mine = [
                    f["estimators"][label]
                    for f in found
                    if f["rate"] == rate and f["activation"] == activation
                ]
                means = {
                    key: np.mean([m[key] for m in mine], axis=0)
                    for key in ("displacement", "effect", "score")
                }
                cells.append(
                    "; ".join(" / ".join(shown(float(x), 3) for x in m) for m in means.values())
                )
            parts.append(f"| {label} | " + " | ".join(cells) + " |")
        parts.append("")
    return "\n".join(parts)


def main() -> None:
    """Every rate, seed and activation; the page on standard output or in a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--page", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for activation in NAMES:
            for rate in RATES:
                for seed in range(options.seeds):
                    path = Path(folder) / f"{activation}-{rate}-{seed}"
                    found.append(examine(rate, seed, activation, path))
                    print(activation, rate, seed, "done", flush=True)
    text = page(found, options.seeds)
    print(text)
    if options.page is not None:
        options.page.write_text(text)
    if options.out is not None:
        for row in (row for f in found for row in f["estimators"].values()):
            for key in ("displacement", "effect", "score"):  # JSON knows no nan
                row[key] = [x if math.isfinite(x) else None for x in row[key]]
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
