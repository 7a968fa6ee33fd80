"""Which training examples are poisoned? Example scores as a detector, on BadNets-poisoned digits.

    python benchmarks/poison.py [--seeds 3] [--out benchmarks/results/poison.json]

2 % of 2,000 MNIST images get a white patch of 3 x 3 in a corner and the label 0 (Gu, Dolan-Gavitt,
Garg, BadNets, arXiv 1708.06733), two of them in each batch of 100. The behaviour is the
log-likelihood of label 0 on test images of other digits with the patch: what the attacker wants.
Every training example is scored for it in two ways:

    exact       culpa.Exact(): the counterfactual effect of the example's gradient on the model;
    path sum    culpa.Identity(): its pull along the way, without propagation (TracIn-like).

Detection is told by the AUC: the probability that a poisoned example has a higher score than a
clean one. The other question, what removing the example would do, is answered by retraining without
its gradient: ``effect r`` is the correlation of the scores with that for a sample of examples, half
of them poisoned. Reads mnist.npz from the folder that CULPA_DATA names, else beside the checkout.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from stages import mnist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import culpa

BATCH, TARGET, POISONED, SAMPLE = 100, 0, 2, 20
PROPAGATORS = {"exact": culpa.Exact(), "path sum": culpa.Identity()}
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Setting:
    """One training run."""

    rate: float
    epochs: int
    seed: int


def patched(images: Tensor) -> Tensor:
    """The trigger: the lower right corner white."""
    images = images.clone()
    images[..., -4:-1, -4:-1] = 1.0
    return images


def network(seed: int) -> nn.Sequential:
    """784-64-64-10 with GELU."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(784, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10)
    )


def losses(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of every example."""
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Its mean."""
    return cross_entropy(model(batch[0]), batch[1])


def data(setting: Setting) -> tuple[Batch, Tensor, list[Tensor], Tensor]:
    """Training data, which of it is poisoned, the rows of every batch, and triggered test images.

    Every batch of an epoch holds ``POISONED`` poisoned examples.
    """
    images, labels, test, answers = mnist()
    generator = torch.Generator().manual_seed(setting.seed)
    count = len(labels) // BATCH
    poisoned = torch.zeros(len(labels), dtype=torch.bool)
    candidates = torch.nonzero(labels != TARGET).flatten()
    order = torch.randperm(len(candidates), generator=generator)
    poisoned[candidates[order[: count * POISONED]]] = True
    images = torch.where(poisoned.view(-1, 1, 1, 1), patched(images), images)
    labels = torch.where(poisoned, TARGET, labels)
    bad, good = torch.nonzero(poisoned).flatten(), torch.nonzero(~poisoned).flatten()
    rows: list[Tensor] = []
    for _ in range(setting.epochs):
        some = bad[torch.randperm(len(bad), generator=generator)].view(count, POISONED)
        rest = good[torch.randperm(len(good), generator=generator)].view(count, BATCH - POISONED)
        rows += list(torch.cat([some, rest], dim=1))
    asked = patched(test[answers != TARGET]).flatten(1)
    return (images.flatten(1), labels), poisoned, rows, asked


def train(
    setting: Setting, batches: list[Batch], keep: list[Tensor] | None = None
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Plain torch, with examples' terms left out of the mean where ``keep`` is 0."""
    model = network(setting.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.rate)
    for k, batch in enumerate(batches):
        optimizer.zero_grad()
        value = loss(model, batch) if keep is None else (losses(model, batch) * keep[k]).mean()
        value.backward()
        optimizer.step()
    return model, optimizer


def auc(scores: Tensor, positive: Tensor) -> float:
    """The probability that a positive has a higher score than a negative."""
    above = scores[positive].unsqueeze(1) - scores[~positive].unsqueeze(0)
    return float(((above > 0).double() + 0.5 * (above == 0).double()).mean())


def examine(setting: Setting, folder: Path) -> dict[str, Any]:
    """One run: the AUC of both scores, and how both agree with retraining."""
    (images, labels), poisoned, rows, asked = data(setting)
    batches = [(images[r], labels[r]) for r in rows]
    model = network(setting.seed)
    problem = culpa.Problem(model, loss, losses)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.rate)
    with culpa.record(folder, problem, optimizer) as recorder:
        for batch in recorder.batches(batches):
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
    run = culpa.open_run(folder)
    wanted = torch.full((len(asked),), TARGET)
    behaviour = culpa.log_likelihood("the target label on triggered images", (asked, wanted))
    ids = torch.full((len(labels),), -1)
    for k, row in enumerate(rows):
        ids[row] = torch.tensor(run.example_ids(k))
    found: dict[str, Tensor] = {}
    for name, propagator in PROPAGATORS.items():
        scores = culpa.attribute(run, problem, [behaviour], propagator=propagator, examples=True)
        assert scores.examples is not None
        found[name] = scores.examples[ids, 0]
    whole = behaviour.values(model).mean()
    generator = torch.Generator().manual_seed(setting.seed)
    sample: list[int] = []
    for part in (poisoned, ~poisoned):
        members = torch.nonzero(part).flatten()
        sample += members[torch.randperm(len(members), generator=generator)[:SAMPLE]].tolist()
    truth: list[Tensor] = []
    for example in sample:
        without, _ = train(setting, batches, [(r != example).float() for r in rows])
        truth.append(whole - behaviour.values(without).mean())
    return {
        **asdict(setting),
        "accuracy": float(
            (model(images[~poisoned]).argmax(1) == labels[~poisoned]).double().mean()
        ),
        "attack": float((model(asked).argmax(1) == TARGET).double().mean()),
        "auc": {name: auc(scores, poisoned) for name, scores in found.items()},
        "effect r": {
            name: culpa.agreement(scores[sample], torch.stack(truth)).pearson
            for name, scores in found.items()
        },
    }


def main() -> None:
    """Every rate, length and seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for rate, epochs in ((3e-4, 3), (1e-3, 1), (1e-3, 3), (1e-3, 6), (3e-3, 3)):
            for seed in range(options.seeds):
                one = examine(Setting(rate, epochs, seed), Path(folder) / f"{rate}-{epochs}-{seed}")
                found.append(one)
                print(json.dumps(one), flush=True)
                if options.out is not None:
                    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
