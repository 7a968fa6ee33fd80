"""Are the grades of sampled secants to be trusted? Stages against their replays, on eight runs.

    python benchmarks/trust_secant.py [--out benchmarks/results/trust_secant.json]

Runs of six stages (15 updates each; the digits moved by 0 to 5 pixels) with the models and
optimizers of trust.py at other rates and seeds, none of them a test's. Every stage but the last,
which is exact, is embedded with ``Secant(0.25)`` and ``Secant(0.5)`` and replayed: the truth is the
effect on the log-likelihood of unseen digits, point by point. About two minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from trust import BATCH, GRADES, Setting, digits, network, stepper

import culpa
from culpa import tree

SETTINGS = (
    Setting("tanh", "sgd", 3e-3, 30),
    Setting("silu", "sgd", 2e-2, 31),
    Setting("gelu", "sgd", 1e-1, 32),
    Setting("relu", "sgd", 3e-2, 33),
    Setting("gelu", "adamw", 3e-4, 34),
    Setting("tanh", "adamw", 3e-3, 35),
    Setting("conv", "adamw", 1e-3, 36),
    Setting("silu", "adamw", 1e-2, 37),
)
STAGES, UPDATES = 6, 15


def train(setting: Setting, folder: Path) -> tuple[culpa.Run, culpa.Problem]:
    """Record one run."""
    torch.manual_seed(setting.seed)
    model = network(setting.model)
    problem = culpa.Problem(model, lambda m, b: cross_entropy(m(b[0]), b[1]))
    optimizer = stepper(setting, model)
    (images, labels), _ = digits()
    order = torch.randperm(len(labels)).repeat(3)
    parts = order[: STAGES * UPDATES * BATCH].split(BATCH)
    with culpa.record(folder, problem, optimizer) as recorder:
        for stage in range(STAGES):
            mine = parts[UPDATES * stage : UPDATES * (stage + 1)]
            moved = torch.roll(images, stage, 1)
            with recorder.stage(f"moved by {stage}"):
                for batch in recorder.batches([(moved[i], labels[i]) for i in mine]):
                    optimizer.zero_grad()
                    problem.loss(model, batch).backward()
                    optimizer.step()
    return culpa.open_run(folder), problem


def examine(setting: Setting, folder: Path) -> list[dict[str, Any]]:
    """One row for each fraction and stage."""
    run, problem = train(setting, folder)
    behaviour = culpa.log_likelihood("log-likelihood of unseen digits", digits()[1])
    final, stages = run.final_state(), run.stages[:-1]
    truths = [culpa.replay(run, problem, without=stage.name) for stage in stages]
    rows: list[dict[str, Any]] = []
    for fraction in (0.25, 0.5):
        found = culpa.embed(run, problem, propagator=culpa.Secant(fraction))
        effects = found.effect(behaviour)
        for stage, truth, effect in zip(stages, truths, effects, strict=False):
            moved = {n: final[n] - truth.state[n] for n in final}
            gap = tree.norm(tree.subtract(found[stage.name], moved))
            agreement = culpa.agreement(effect, truth.effect(behaviour))
            trust = found.trust[stage.name]
            rows.append(
                {
                    "run": str(setting),
                    "fraction": fraction,
                    "stage": stage.name,
                    "residual": round(trust.residual, 4),
                    "error_of_displacement": round(gap / tree.norm(moved), 4),
                    "growth": round(trust.growth, 2),
                    "pearson": round(agreement.pearson, 4),
                    "relative_error": round(agreement.relative_error, 4),
                    "grade": trust.grade,
                }
            )
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By grade: how many stages, and how well they agree."""
    by_grade: dict[str, dict[str, Any]] = {}
    for grade in GRADES:
        mine = [row for row in rows if row["grade"] == grade]
        if mine:
            by_grade[grade] = {
                "stages": len(mine),
                "pearson_least": min(row["pearson"] for row in mine),
                "pearson_median": statistics.median(row["pearson"] for row in mine),
                "relative_error_worst": max(row["relative_error"] for row in mine),
                "relative_error_median": statistics.median(row["relative_error"] for row in mine),
            }
    return by_grade


def main() -> None:
    """Run every setting and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=None)
    out: Path | None = parser.parse_args().out
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for at, setting in enumerate(SETTINGS):
            rows += examine(setting, Path(folder) / str(at))
    ratios = [row["residual"] / row["error_of_displacement"] for row in rows]
    result = {
        "by_grade": summary(rows),
        "residual_over_error_median": round(statistics.median(ratios), 2),
        "rows": rows,
    }
    print(json.dumps(result, indent=1))
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
