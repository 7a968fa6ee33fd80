"""culpa.dvemb against the ``dattri`` package's DVEmb: the same numbers, from the same training run.

    make bench-peers, or in that environment (benchmarks/peers/install.sh):
    python benchmarks/dvemb_dattri.py

A GELU MLP learns scikit-learn's digits by plain SGD in float64, two epochs. dattri gathers every
example's gradient while it trains and multiplies dense matrices (examples x parameters and
parameters x parameters); culpa records, and sweeps backwards afterwards. Written as JSON: the
largest gap over all (training example, test image) pairs relative to the largest score, their
correlation, and seconds. Not part of the tests: dattri is no dependency.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import culpa

Batch = tuple[Tensor, Tensor]


def losses(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of every example."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Its mean, which the loop minimises."""
    return losses(model, batch).mean()


def dattri_attributor(model: nn.Module, dimensions: int | None = None) -> Any:
    """dattri's DVEmb on the model that is being trained; ``dimensions``: projected to so many."""
    from dattri.algorithm.dvemb import DVEmbAttributor
    from dattri.task import AttributionTask

    def one(params: dict[str, Tensor], data: Batch) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, params, (data[0],)), data[1])

    return DVEmbAttributor(
        AttributionTask(loss_func=one, model=model, checkpoints=[{}]), dimensions
    )


def compare(hidden: int, rate: float, examples: int, batch: int, tests: int) -> dict[str, float]:
    """Train once with both, and compare every example's score on every test image."""
    torch.manual_seed(0)
    data: Any = load_digits()
    images = torch.tensor(data.data / 16.0, dtype=torch.float64)
    targets = torch.tensor(data.target)
    held_out = images[-tests:], targets[-tests:]
    model = nn.Sequential(nn.Linear(64, hidden), nn.GELU(), nn.Linear(hidden, 10)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    problem = culpa.Problem(model, loss, example_losses=losses)
    theirs, gathering = dattri_attributor(model), 0.0
    order: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        with culpa.record(Path(folder) / "run", problem, optimizer) as recorder:
            for epoch in range(2):
                rows = torch.randperm(examples).split(batch)
                with recorder.stage(f"epoch {epoch + 1}"):
                    loader = [(images[r], targets[r]) for r in rows]
                    for r, given in zip(rows, recorder.batches(loader), strict=True):
                        began = time.perf_counter()
                        theirs.cache_gradients(epoch, given, r, rate)
                        gathering += time.perf_counter() - began
                        order += r.tolist()
                        optimizer.zero_grad()
                        loss(model, given).backward()
                        optimizer.step()
        began = time.perf_counter()
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            theirs.cache()
            found = theirs.attribute(DataLoader(TensorDataset(*held_out), batch_size=tests))
        dattri_seconds = gathering + time.perf_counter() - began
        run = culpa.open_run(Path(folder) / "run")
        asked = [
            culpa.log_likelihood(f"image {i}", (held_out[0][i : i + 1], held_out[1][i : i + 1]))
            for i in range(tests)
        ]
        began = time.perf_counter()
        scores = culpa.dvemb(run, problem, asked)
        culpa_seconds = time.perf_counter() - began
        ids = [example for k in range(run.num_steps) for example in run.example_ids(k)]
    # dattri counts rows of the data set, culpa distinct examples in order of their first use.
    ours = torch.zeros_like(found)
    for row, example in zip(order, ids, strict=True):
        ours[row] = scores.examples[example]
    used = sorted(set(order))
    both = torch.stack([ours[used].reshape(-1), found[used].reshape(-1)])
    return {
        "updates": float(len(order) // batch),
        "parameters": float(sum(p.numel() for p in model.parameters())),
        "pairs": float(both.shape[1]),
        "largest gap / largest score": float((both[0] - both[1]).abs().max() / both[1].abs().max()),
        "correlation": float(torch.corrcoef(both)[0, 1]),
        "dattri seconds": dattri_seconds,
        "culpa seconds": culpa_seconds,
        "accuracy": float((model(held_out[0]).argmax(1) == held_out[1]).double().mean()),
    }


def main() -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hidden", type=int, default=16)
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--examples", type=int, default=640)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tests", type=int, default=10)
    torch.set_num_threads(1)
    sys.stdout.write(json.dumps(compare(**vars(parser.parse_args())), indent=1) + "\n")


if __name__ == "__main__":
    main()
