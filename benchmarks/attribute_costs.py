"""What do example scores and further behaviours cost? In units of the run's own training.

    python benchmarks/attribute_costs.py [--repeats 7] [--out FILE]

40 updates of 100 MNIST images by SGD with momentum .9, the networks of ten_stages.py. Processor
time (one thread; the machine may be shared) of ``culpa.attribute`` for one behaviour, the same with
``examples=True``, and for four behaviours, each by the exact Hessian and by Gauss-Newton
products, in turn in one process; the least of ``--repeats``, since the cost of example scores is a
small difference of large times. A training is the plain loop over batches in memory, without culpa.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from stages import BATCH, mnist
from ten_stages import network
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import culpa

UPDATES, BEHAVIOURS = 40, (1, 4)
PROPAGATORS = {"Exact": culpa.Exact(hvp="reverse-over-reverse"), "GaussNewton": culpa.GaussNewton()}
Batch = tuple[Tensor, Tensor]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean."""
    return cross_entropy(model(batch[0]), batch[1])


def losses(model: nn.Module, batch: Batch) -> Tensor:
    """Each example's."""
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def seconds(work: Callable[[], Any]) -> float:
    """Processor time."""
    began = time.process_time()
    work()
    return time.process_time() - began


def examine(kind: str, repeats: int, folder: Path) -> dict[str, Any]:
    """One network."""
    images, labels, test, answers = mnist()
    rows = torch.cat([torch.randperm(len(labels)) for _ in range(2)]).split(BATCH)
    batches = [(images[r].flatten(1), labels[r]) for r in rows[:UPDATES]]
    model = network(kind)
    problem = culpa.Problem(model, loss, losses)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    with culpa.record(folder, problem, optimizer) as recorder:
        for batch in recorder.batches(batches):
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
    run = culpa.open_run(folder)
    parts = zip(test.flatten(1).split(25), answers.split(25), strict=True)
    asked = [culpa.log_likelihood(f"part {i}", part) for i, part in enumerate(parts)]

    def plain() -> None:
        other = network(kind)
        its = torch.optim.SGD(other.parameters(), lr=1e-2, momentum=0.9)
        for batch in batches:
            its.zero_grad()
            loss(other, batch).backward()
            its.step()

    found: dict[str, Any] = {"network": kind}
    for name, propagator in PROPAGATORS.items():
        spent: dict[str, list[float]] = {}
        for _ in range(repeats):
            once = {"training": seconds(plain)}

            def sweep(count: int, by_example: bool, by: Any = propagator) -> None:
                culpa.attribute(run, problem, asked[:count], propagator=by, examples=by_example)

            once |= {f"behaviours {n}": seconds(lambda n=n: sweep(n, False)) for n in BEHAVIOURS}
            once["with examples"] = seconds(lambda: sweep(1, True))
            for key, value in once.items():
                spent.setdefault(key, []).append(value)
        least = {key: min(v) for key, v in spent.items()}
        found[name] = {k: round(v / least["training"], 2) for k, v in least.items()}
        extra = least["with examples"] - least["behaviours 1"]
        found[name]["examples alone"] = round(extra / least["training"], 2)
    return found


def main() -> None:
    """Every network."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args()
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    for kind in ("mlp", "wide", "conv"):
        with tempfile.TemporaryDirectory() as folder:
            results.append(examine(kind, given.repeats, Path(folder) / "run"))
        print(json.dumps(results[-1]), flush=True)
    if given.out is not None:
        given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
