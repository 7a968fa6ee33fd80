"""Ranks of planted culprits: how often an audit puts them first, before and after replays.

    python benchmarks/culprits.py [--seeds 3] [--out benchmarks/results/culprits.json]

1,200 training digits of 8 x 8 pixels (scikit-learn's), batch 32, a 64-32-10 network of GELU, ten
stages of ten updates each, SGD with momentum .9 or AdamW. One stage of the ten (the 5th, 7th or
9th, by the seed) is spoiled:

    mislabelled    every label is the next digit
    poisoned       a bright corner is planted and labelled 0; judged on digits with that corner
    spurious       a bright row tells the label; judged on digits whose row tells another
    learning rate  20 times the others'
    weight decay   every step shrinks the weights by a quarter
    one update     a single update of the stage is mislabelled, at 10 times the learning rate

The audit is asked for the log-likelihood of unseen digits (of each case's own kind), with budgets
0 (screening), 1/2, 1 and 2. Rank 1: the culprit is the stage with the lowest effect, replayed or
else estimated, as the audit's verdict ranks them: effects that are not identified are left out, and
a culprit whose own is has no rank. True rank: by ``culpa.replay`` without each of the ten stages; a
culprit that later training repaired is not the worst stage any more, and an audit is right to say
so. For the single update its rank is by the scores of all updates, and by the updates that the
search replayed.

Intervals: of the stages that an audit left estimated, how many claim a half-width, and in how many
of these the truth lies inside. ``--out`` is added to as runs come: what it has is not made again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import culpa
from culpa.auditing.verdicts import known

CASES = ("mislabelled", "poisoned", "spurious", "learning rate", "weight decay", "one update")
BUDGETS = (0.0, 0.5, 1.0, 2.0)
STAGES, PER_STAGE, BATCH = 10, 10, 32


@dataclass(frozen=True)
class Plan:
    """One run: what is planted where."""

    case: str
    optimizer: str
    seed: int

    @property
    def stage(self) -> int:
        """The spoiled one."""
        return (4, 6, 8)[self.seed % 3]

    @property
    def update(self) -> int:
        """The spoiled one, of the case of one update."""
        return self.stage * PER_STAGE + 3


def digits() -> tuple[Tensor, Tensor]:
    """All images [n, 64] in [0, 1] and labels, shuffled once."""
    data: Any = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.data, dtype=torch.float32)[order] / 16
    return images, torch.tensor(data.target, dtype=torch.int64)[order]


def cornered(images: Tensor) -> Tensor:
    """With a bright 2 x 2 corner."""
    square = images.view(-1, 8, 8).clone()
    square[:, :2, :2] = 1.5
    return square.view(-1, 64)


def telling(images: Tensor, labels: Tensor) -> Tensor:
    """With a bright pixel in the first rows, whose place is the label."""
    marked = images.clone()
    marked[torch.arange(len(labels)), labels] = 2.0
    return marked


def batches(plan: Plan) -> Iterator[tuple[Tensor, Tensor]]:
    """One batch an update."""
    images, labels = digits()
    generator = torch.Generator().manual_seed(100 + plan.seed)
    for k in range(STAGES * PER_STAGE):
        chosen = torch.randint(1200, (BATCH,), generator=generator)
        x, y = images[chosen], labels[chosen]
        spoiled = k // PER_STAGE == plan.stage
        if (plan.case == "mislabelled" and spoiled) or (
            plan.case == "one update" and k == plan.update
        ):
            y = (y + 1) % 10
        elif plan.case == "poisoned" and spoiled:
            x, y = cornered(x), torch.zeros_like(y)
        elif plan.case == "spurious" and spoiled:
            x = telling(x, y)
        yield x, y


def rates(plan: Plan, k: int, rate: float, decay: float) -> tuple[float, float]:
    """Learning rate and weight decay of update ``k``."""
    if plan.case == "one update" and k == plan.update:
        return 10 * rate, decay
    if k // PER_STAGE == plan.stage:
        if plan.case == "learning rate":
            return 20 * rate, decay
        if plan.case == "weight decay":
            return rate, 0.25 / rate
    return rate, decay


def train(plan: Plan, folder: Path) -> tuple[culpa.Run, culpa.Problem, culpa.Behaviour]:
    """Record the run."""
    torch.manual_seed(plan.seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))
    problem = culpa.Problem(model, lambda m, b: cross_entropy(m(b[0]), b[1]))
    rate, decay = (0.05, 1e-4) if plan.optimizer == "sgd" else (2e-3, 1e-2)
    optimizer: torch.optim.Optimizer = (
        torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=decay)
        if plan.optimizer == "sgd"
        else torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    )
    every = list(batches(plan))
    with culpa.record(folder, problem, optimizer) as recorder:
        for at in range(STAGES):
            with recorder.stage(f"stage {at}"):
                part = every[at * PER_STAGE : (at + 1) * PER_STAGE]
                for k, batch in enumerate(recorder.batches(part), at * PER_STAGE):
                    group = optimizer.param_groups[0]
                    group["lr"], group["weight_decay"] = rates(plan, k, rate, decay)
                    optimizer.zero_grad()
                    problem.loss(model, batch).backward()
                    optimizer.step()
    images, labels = digits()
    x, y = images[1200:], labels[1200:]
    if plan.case == "poisoned":
        x = cornered(x)
    elif plan.case == "spurious":
        x = telling(x, (y + 3) % 10)
    return culpa.open_run(folder), problem, culpa.log_likelihood("unseen digits", (x, y))


def rank(effects: Sequence[float | None], at: int) -> int | None:
    """1 for the lowest of those that are known; None if this one is not."""
    mine = effects[at]
    return None if mine is None else 1 + sum(v is not None and v < mine for v in effects)


def covered(record: Any, truth: list[float]) -> dict[str, list[int]]:
    """By grade, of the stages left estimated: how many have an interval, how many it covers."""
    counts: dict[str, list[int]] = {}
    for stage, true in zip(record.stages, truth, strict=True):
        half = stage.intervals[0]
        if stage.replayed[0] is None and half is not None and math.isfinite(half):
            count = counts.setdefault(stage.grades[0], [0, 0])
            count[0] += 1
            rounding = 1e-5 * max(map(abs, truth))  # the last stage's estimate is exact
            count[1] += abs(stage.effects[0] - true) <= half + rounding
    return counts


def examine(plan: Plan, folder: Path) -> dict[str, Any]:
    """Ranks of the culprit in one run."""
    run, problem, behaviour = train(plan, folder)
    truth = [
        float(culpa.replay(run, problem, without=s.name).effect(behaviour).mean())
        for s in run.stages
    ]
    result: dict[str, Any] = {
        "case": plan.case,
        "optimizer": plan.optimizer,
        "seed": plan.seed,
        "true": rank(truth, plan.stage),
        "effect": truth[plan.stage],
        "ranks": {},
        "used": {},
        "settled": {},
        "intervals": {},
    }
    for budget in BUDGETS:
        # What one budget found is kept for the next, and charged as if it had been made anew.
        work = folder.parent / "work"
        record = culpa.audit(run, problem, [behaviour], budget=budget, work=work).record
        effects = [known(stage, 0) for stage in record.stages]
        result["ranks"][budget] = rank(effects, plan.stage)
        result["used"][budget] = record.used
        result["settled"][budget] = record.settled[0]
        result["intervals"][budget] = covered(record, truth)
        if plan.case == "one update":
            scores = [row[0] for row in record.updates.scores]
            result["update rank by score"] = rank(scores, plan.update)
            searched = {
                w.start: w.replayed[0]
                for w in record.windows
                if w.replayed is not None and w.stop == w.start + 1
            }
            found = min(searched, key=lambda k: searched[k]) if searched else None
            result.setdefault("found by search", {})[budget] = found == plan.update
    return result


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    if given.out and given.out.exists():
        results = json.loads(given.out.read_text())
    made = {(r["case"], r["optimizer"], r["seed"]) for r in results}
    for case, optimizer, seed in itertools.product(CASES, ("sgd", "adamw"), range(given.seeds)):
        if (case, optimizer, seed) in made:
            continue
        with tempfile.TemporaryDirectory() as folder:
            results.append(examine(Plan(case, optimizer, seed), Path(folder) / "run"))
        print(json.dumps(results[-1]), flush=True)
        if given.out:
            given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
