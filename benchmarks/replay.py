"""What walking a recorded run again costs: replays, verification, counterfactuals side by side.

    python benchmarks/replay.py [--repeats 5] [--out benchmarks/results/replay.json]

``plain`` is the loop alone over batches in memory, without culpa. All of a case's ways run in turn,
``--repeats`` times, each round between two plain ones, and their processor time is divided by that
of the plain loop (one thread; the machine may be shared); the medians are reported. All figures are
of one update:

``counterfactual``  ``culpa.replay(without=[0])``: nothing to compare with.
``replay``          ``culpa.replay()``: every update is hashed and compared with the record.
``walk``            what ``attribute`` and ``embed`` pass through: compared, every state copied.
``verify``          ``run.verify(level="replay")``, the digests of the whole folder included.

``side by side``: ``culpa.replay_many`` without each of N stages by vmap, over N replays.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from training_loops import Residual, mlp, sgd

import culpa
from culpa.estimators.side_by_side import replay_many
from culpa.trajectory.walk import forward, session

Batch = tuple[Tensor, Tensor]
STAGES = 8


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Of classes, one a row or one a token."""
    return nn.functional.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def resnet20() -> nn.Module:
    """Nine blocks of 16, 32 and 64 channels on 32 x 32 images."""
    widths = [16] * 4 + [32] * 3 + [64] * 3
    blocks = [Residual(a, b, 1 + (a != b)) for a, b in itertools.pairwise(widths)]
    first = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    last = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    return nn.Sequential(*first, *blocks, *last)


def transformer() -> nn.Module:
    """Two layers of 64 dimensions over 512 tokens."""
    layer = nn.TransformerEncoderLayer(64, 4, 128, 0.0, "gelu", batch_first=True)
    body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(nn.Embedding(512, 64), body, nn.Linear(64, 512))


def tiny() -> nn.Module:
    """784-32-32-10: most of its time is Python's."""
    return nn.Sequential(
        nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """With its defaults."""
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def images(*shape: int) -> Callable[[int], Batch]:
    """Noise in ten classes."""
    return lambda count: (torch.randn(count, *shape), torch.randint(0, 10, (count,)))


def tokens(count: int) -> Batch:
    """Sequences of 64, and the next ones."""
    made = torch.randint(0, 512, (count, 65))
    return made[:, :-1], made[:, 1:]


@dataclass(frozen=True)
class Case:
    """A loop of ``STAGES`` stages of ``updates`` each over 20 batches of ``size`` examples."""

    name: str
    model: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    data: Callable[[int], Batch]
    size: int
    updates: int

    def batches(self) -> list[list[Batch]]:
        """Of every stage."""
        torch.manual_seed(0)
        inputs, targets = self.data(20 * self.size)
        rows = [torch.randperm(len(inputs)) for _ in range(1 + STAGES * self.updates // 20)]
        made = [(inputs[i], targets[i]) for epoch in rows for i in epoch.split(self.size)]
        return [made[s * self.updates : (s + 1) * self.updates] for s in range(STAGES)]


CASES = (
    Case("MLP 784-128-128-10, batch 100", mlp, sgd, images(784), 100, 25),
    Case("ResNet-20, 32 x 32, batch 32", resnet20, sgd, images(3, 32, 32), 32, 1),
    Case("transformer of 2 x 64, 64 tokens, batch 8, AdamW", transformer, adamw, tokens, 8, 5),
)
SIDEWAYS = (
    Case("MLP 784-32-32-10, batch 25", tiny, sgd, images(784), 25, 40),
    Case("MLP 784-128-128-10, batch 100", mlp, sgd, images(784), 100, 25),
)


def train(case: Case, folder: Path) -> tuple[culpa.Run, culpa.Problem, Callable[[], None]]:
    """Record the run; also the plain loop."""
    stages = case.batches()
    torch.manual_seed(1)
    model = case.model()
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    problem, optimizer = culpa.Problem(model, loss), case.optimizer(model)

    def updates(batches: Iterable[Batch], optimizer: torch.optim.Optimizer) -> None:
        for batch in batches:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()

    def plain() -> None:
        model.load_state_dict(initial)
        fresh = case.optimizer(model)
        for batches in stages:
            updates(batches, fresh)

    with culpa.record(folder, problem, optimizer) as recorder:
        for number, batches in enumerate(stages):
            with recorder.stage(f"stage {number}"):
                updates(recorder.batches(batches), optimizer)
    return culpa.open_run(folder), problem, plain


def spent(work: Callable[[], Any]) -> float:
    """Processor seconds."""
    began = time.process_time()
    work()
    return time.process_time() - began


def walk(run: culpa.Run, problem: culpa.Problem) -> None:
    """Every observed update, as a sweep sees it."""
    with session(run, problem) as engine:
        for _ in forward(run, engine, 0, run.num_steps):
            pass


def ratios(ways: dict[str, Callable[[], Any]], unit: Callable[[], Any], repeats: int) -> Any:
    """Median of each way's time over that of ``unit`` just before and after; and all of them."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    unit()
    for _ in range(repeats):
        before = spent(unit)
        for name, way in ways.items():
            seconds, after = spent(way), spent(unit)
            found[name].append(2 * seconds / (before + after))
            before = after
    return {name: {"median": statistics.median(r), "all": r} for name, r in found.items()}


def again(case: Case, repeats: int, folder: Path) -> dict[str, Any]:
    """The ways of walking a run again, per update, over the plain loop."""
    run, problem, plain = train(case, folder)
    ways: dict[str, Callable[[], Any]] = {
        "counterfactual": lambda: culpa.replay(run, problem, without=[0]),
        "replay": lambda: culpa.replay(run, problem),
        "walk": lambda: walk(run, problem),
        "verify": lambda: run.verify(problem, level="replay"),
    }
    return {"case": case.name, "updates": run.num_steps, "over plain": ratios(ways, plain, repeats)}


def sideways(case: Case, repeats: int, folder: Path) -> dict[str, Any]:
    """Counterfactuals by vmap over as many replays, and how far apart they end."""
    run, problem, _ = train(case, folder)
    found: dict[str, Any] = {}
    for count in (2, 4, 8):
        names = [stage.name for stage in run.stages[:count]]

        def together(names: list[str] = names) -> Any:
            return replay_many(run, problem, names, side_by_side=True)

        def alone(names: list[str] = names) -> Any:
            return replay_many(run, problem, names, side_by_side=False)

        made = ratios({"together": together}, alone, repeats)["together"]
        pairs = list(zip(together(), alone(), strict=True))
        made["claim"] = pairs[0][0].claim
        made["largest difference"] = max(
            float((a.state[n] - b.state[n]).abs().max()) for a, b in pairs for n in a.state
        )
        made["auto"] = replay_many(run, problem, names).how
        found[str(count)] = made
    return {"case": case.name, "updates": run.num_steps, "over the sum": found}


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/replay.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, list[dict[str, Any]]] = {"again": [], "side by side": []}
    for part, cases, measure in (("again", CASES, again), ("side by side", SIDEWAYS, sideways)):
        for case in cases:
            with tempfile.TemporaryDirectory() as folder:
                results[part].append(measure(case, given.repeats, Path(folder) / "run"))
            print(json.dumps(results[part][-1]), flush=True)
    if given.out:
        given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
