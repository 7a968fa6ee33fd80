"""culpa.attribute against dattri's DVEmb: time, and agreement with retraining without each example.

    make bench-peers, or in that environment:
    python benchmarks/peers_dattri.py [--repeats 5] [--out benchmarks/results/peers_dattri.json]

A 64-64-10 GELU perceptron learns 640 of scikit-learn's digits by plain SGD, the only optimiser
that DVEmb models, in float64: two epochs of batches of 32, 40 updates. Asked: by how much did each
training example change the mean log-likelihood of 200 held-out digits? Both answer for all examples
at once. Truth: a plain loop that leaves one example out of the mean of its batches (its gradient is
zero, the others keep their weight), for 60 examples drawn at random.

DVEmb gathers every example's gradient beside training, then walks back with a matrix of parameters
x parameters in place of the Hessian (the empirical Fisher); ``projected`` has 1,024 random
dimensions of it, the package's way to larger models. ``culpa.dvemb`` computes the same numbers as
``full`` without the matrix (dvemb_dattri.py shows that they are equal). culpa's times include
recording; every time is processor seconds over those of the plain loop of the same round, in turn
in one process with one thread; medians of ``--repeats`` rounds, after one at each learning rate.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from dvemb_dattri import Batch, dattri_attributor, loss, losses
from sklearn.datasets import load_digits
from spent import seconds
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import culpa
from culpa.experiments.frame.machine import machine

EXAMPLES, BATCH, EPOCHS, TESTS, LEFT_OUT = 640, 32, 2, 200, 60
RATES = (0.05, 0.2)
PROJECTED = 1024


class Setting(NamedTuple):
    """The data, the order of the examples, and the learning rate."""

    images: Tensor
    targets: Tensor
    order: list[list[Tensor]]
    """Rows of each batch of each epoch."""
    rate: float

    @property
    def held_out(self) -> Batch:
        """What the behaviour is measured on."""
        return self.images[-TESTS:], self.targets[-TESTS:]

    def batches(self) -> Iterator[tuple[int, Tensor, Batch]]:
        """Epoch, rows, batch."""
        for epoch, parts in enumerate(self.order):
            for rows in parts:
                yield epoch, rows, (self.images[rows], self.targets[rows])


def setting(rate: float) -> Setting:
    """The same order at every rate."""
    data: Any = load_digits()
    images = torch.tensor(data.data / 16.0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    order = [
        list(torch.randperm(EXAMPLES, generator=generator).split(BATCH)) for _ in range(EPOCHS)
    ]
    return Setting(images, torch.tensor(data.target), order, rate)


def network() -> nn.Module:
    """4,810 parameters."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10)).double()


def step(optimizer: torch.optim.Optimizer, value: Tensor) -> None:
    """One update."""
    optimizer.zero_grad()
    value.backward()
    optimizer.step()


def train(given: Setting, without: int | None = None) -> nn.Module:
    """The plain loop; ``without`` a row: with its loss taken out of the sums."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=given.rate)
    for _, rows, batch in given.batches():
        value = loss(model, batch)
        if without is not None and bool((rows == without).any()):
            value = value - losses(model, batch)[rows == without].sum() / len(rows)
        step(optimizer, value)
    return model


def dattri(given: Setting, projected: bool) -> Tensor:
    """Its scores of every row for the mean held-out loss: [examples]."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=given.rate)
    theirs = dattri_attributor(model, PROJECTED if projected else None)
    for epoch, rows, batch in given.batches():
        theirs.cache_gradients(epoch, batch, rows, given.rate)
        step(optimizer, loss(model, batch))
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        theirs.cache()
        held_out = DataLoader(TensorDataset(*given.held_out), batch_size=TESTS)
        return theirs.attribute(held_out).mean(1)


def ours(given: Setting, ask: Callable[..., Any], folder: Path) -> Tensor:
    """The same by culpa, recording included."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=given.rate)
    problem = culpa.Problem(model, loss, example_losses=losses)
    rows = [r for _, part, _ in given.batches() for r in part.tolist()]
    with culpa.record(folder, problem, optimizer) as recorder:
        for batch in recorder.batches([batch for _, _, batch in given.batches()]):
            step(optimizer, loss(model, batch))
    run = culpa.open_run(folder)
    scores = ask(run, problem, [culpa.log_likelihood("held out", given.held_out)])
    found = torch.zeros(EXAMPLES, dtype=torch.float64)
    ids = [example for k in range(run.num_steps) for example in run.example_ids(k)]
    by_id = torch.as_tensor(scores.examples)[:, 0]
    for row, example in zip(rows, ids, strict=True):
        found[row] = by_id[example]
    return found


def attribute(*asked: Any) -> Any:
    """What stands against DVEmb: the exact sweep."""
    return culpa.attribute(
        *asked, propagator=culpa.Exact(), counterfactual="zero-gradient", examples=True
    )


def once(given: Setting) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Processor seconds of every method, and its scores."""
    spent, found = {"plain": seconds(lambda: train(given))[0]}, dict[str, Tensor]()
    with tempfile.TemporaryDirectory() as name:
        methods: dict[str, Callable[[], Tensor]] = {
            "dattri, full": lambda: dattri(given, projected=False),
            "dattri, projected": lambda: dattri(given, projected=True),
            "culpa.attribute": lambda: ours(given, attribute, Path(name, "attribute")),
            "culpa.dvemb": lambda: ours(given, culpa.dvemb, Path(name, "dvemb")),
        }
        for method, work in methods.items():
            spent[method], found[method] = seconds(work)
    return spent, found


def truth(given: Setting) -> tuple[Tensor, Tensor]:
    """Rows, and by how much the mean held-out log-likelihood falls without each."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randperm(EXAMPLES, generator=generator)[:LEFT_OUT]
    whole = loss(train(given), given.held_out).item()
    effects = [loss(train(given, int(r)), given.held_out).item() - whole for r in rows]
    return rows, torch.tensor(effects, dtype=torch.float64)


def correlations(given: Setting, found: dict[str, Tensor]) -> dict[str, Any]:
    """Pearson, over the examples that were left out, of every method with retraining."""
    rows, effects = truth(given)
    correct = (train(given)(given.held_out[0]).argmax(1) == given.held_out[1]).double().mean()
    return {
        "rate": given.rate,
        "accuracy": round(float(correct), 3),
        "correlation with retraining": {
            name: round(float(torch.corrcoef(torch.stack([s[rows], effects]))[0, 1]), 4)
            for name, s in found.items()
        },
    }


def times(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Medians over rounds; a time does not depend on the learning rate."""
    ratios = {n: [r[n] / r["plain"] for r in rounds] for n in rounds[0] if n != "plain"}
    faster = statistics.median(r["dattri, full"] / r["culpa.attribute"] for r in rounds)
    return {
        "plain seconds": round(statistics.median(r["plain"] for r in rounds), 4),
        "times plain training": {n: round(statistics.median(x), 1) for n, x in ratios.items()},
        "dattri, full, over culpa.attribute": round(faster, 1),
    }


def main() -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/peers_dattri.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    load = round(os.getloadavg()[0], 2)
    rounds, agreed = list[dict[str, float]](), list[dict[str, Any]]()
    for rate in given.rates:
        _, found = once(setting(rate))
        agreed.append(correlations(setting(rate), found))
        print(json.dumps(agreed[-1]), flush=True)
    for _ in range(given.repeats):
        rounds.append(once(setting(given.rates[0]))[0])
        print({n: round(s / rounds[-1]["plain"], 1) for n, s in rounds[-1].items()}, flush=True)
    content = {
        "what": "scores of 640 examples, 40 updates of a 64-64-10 perceptron, processor time",
        "machine": machine(),
        "load before": load,
        "versions": {p: version(p) for p in ("torch", "dattri", "culpa")},
        "repeats": given.repeats,
        **times(rounds),
        "by learning rate": agreed,
    }
    given.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
