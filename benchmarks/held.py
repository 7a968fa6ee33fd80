"""What ``dtype=torch.bfloat16`` of waiting updates costs in exactness, and saves in bytes.

    CULPA_DATA=... python benchmarks/held.py [--out benchmarks/results/held.json]

Four runs at practical rates, three stages each, whose segments between two kept states are whole
stages: ``culpa.attribute`` with exact products for three behaviours and with example scores, of
updates that wait as they are and of such that wait in bfloat16; the distance of the scores relative
to the norm of the exact ones. Beside it what rounding the states themselves would do (``Rounded``).

Then the same sweep of a larger network, each in a process of its own: by how much it raises the
peak of resident memory, and the most bytes that lay on disk. No seconds are measured, so that it
means as much on a busy machine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from parameters import Decoder
from spent import peak
from stages import mnist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import culpa
from culpa.experiments.frame.machine import machine
from culpa.trajectory.hold import Hold
from culpa.trajectory.state import State
from culpa.trajectory.walk import Transition
from culpa.tree import Tree

HALF = torch.bfloat16
STAGES, BATCH, ASKED = 3, 50, 3
WORDS = 256
Batch = tuple[Tensor, Tensor]
ROOMS: dict[str, Callable[[Path], Hold]] = {
    "in memory": lambda _: culpa.InMemory(),
    "in memory, bfloat16": lambda _: culpa.InMemory(dtype=HALF),
    "on disk": culpa.OnDisk,
    "on disk, bfloat16": lambda folder: culpa.OnDisk(folder, dtype=HALF),
}


@dataclass(frozen=True)
class Case:
    """A training run of ``STAGES`` stages of ``each`` updates."""

    name: str
    model: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    data: Callable[[int], list[Batch]]
    each: int


class Rounded:
    """A hold that rounds states, not increments: what this would do without rounded.py."""

    dtype = HALF

    def backwards(self, way: Iterable[Transition]) -> Iterator[Transition]:
        """See ``Hold``."""

        def less(values: Tree) -> Tree:
            wide = (torch.float32, torch.float64)
            return {n: v.to(HALF).to(v.dtype) if v.dtype in wide and v.ndim else v
                    for n, v in values.items()}  # fmt: skip

        def state(full: State) -> State:
            return State(less(full.params), full.buffers,
                         {slot: less(of) for slot, of in full.slots.items()})  # fmt: skip

        for one in reversed(list(way)):
            yield replace(one, before=state(one.before), after=state(one.after),
                          grads=less(one.grads), rounded=True)  # fmt: skip


def losses(model: nn.Module, batch: Batch) -> Tensor:
    """Each row's mean."""
    found = model(batch[0])
    rows = cross_entropy(found if found.ndim == 2 else found.transpose(1, 2), batch[1],
                         reduction="none")  # fmt: skip
    return rows if rows.ndim == 1 else rows.mean(1)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """The mean over rows."""
    return losses(model, batch).mean()


def perceptron(width: int = 128) -> nn.Module:
    """784, twice ``width``, 10."""
    layers = [nn.Linear(784, width), nn.GELU(), nn.Linear(width, width), nn.GELU()]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(width, 10))


def convolutions() -> nn.Module:
    """Two, each with BatchNorm and ReLU."""
    first = (nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
    second = (nn.Conv2d(8, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(16 * 6 * 6, 10))


def decoder() -> nn.Module:
    """Two blocks of width 64, every parameter of them trained."""
    return Decoder(64, 2).requires_grad_(True)


def images(count: int) -> list[Batch]:
    """Shuffled digits."""
    pictures, labels, _, _ = mnist()
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(len(labels), (count, BATCH), generator=generator)
    return [(pictures[r], labels[r]) for r in rows]


def texts(count: int) -> list[Batch]:
    """Sequences of 32 words, of which each mostly decides the next: there is something to learn."""
    generator = torch.Generator().manual_seed(1)
    after = torch.randint(WORDS, (WORDS, 2), generator=generator)
    words = [torch.randint(WORDS, (count * 16,), generator=generator)]
    for _ in range(32):
        which = torch.randint(2, (count * 16,), generator=generator)
        words.append(after[words[-1], which])
    tokens = torch.stack(words, 1).split(16)
    return [(one[:, :-1], one[:, 1:]) for one in tokens]


def sgd(rate: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """With momentum."""
    return lambda model: torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)


def adamw(rate: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """With weight decay."""
    return lambda model: torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)


CASES = (
    Case("perceptron, SGD .01", perceptron, sgd(0.01), images, 40),
    Case("perceptron, AdamW 1e-3", perceptron, adamw(1e-3), images, 40),
    Case("convolutions, BatchNorm, ReLU, SGD .01", convolutions, sgd(0.01), images, 40),
    Case("decoder, AdamW 1e-3", decoder, adamw(1e-3), texts, 20),
)
LARGE = Case("perceptron", lambda: perceptron(1000), adamw(1e-4), images, 20)


def record(case: Case, folder: Path) -> tuple[culpa.Run, culpa.Problem, list[culpa.Behaviour]]:
    """Train, recorded; and what is asked."""
    torch.manual_seed(0)
    model = case.model()
    optimizer = case.optimizer(model)
    problem = culpa.Problem(model, loss, example_losses=losses)
    batches = case.data(STAGES * case.each + ASKED)
    with culpa.record(folder, problem, optimizer, checkpoints=culpa.AtStages()) as recorder:
        for stage in range(STAGES):
            mine = batches[stage * case.each : (stage + 1) * case.each]
            with recorder.stage(f"stage {stage}"):
                for batch in recorder.batches(mine):
                    optimizer.zero_grad()
                    loss(model, batch).backward()
                    optimizer.step()
    asked = [
        culpa.Behaviour(f"part {i}", lambda m, b: -losses(m, b), batch)
        for i, batch in enumerate(batches[-ASKED:])
    ]
    return culpa.open_run(folder), problem, asked


def distance(found: Tensor, exact: Tensor) -> float:
    """Relative, the largest over behaviours."""
    return float(((found - exact).norm(dim=0) / exact.norm(dim=0)).max())


def compared(case: Case) -> dict[str, Any]:
    """The distances of one run's scores."""
    with tempfile.TemporaryDirectory() as folder:
        run, problem, asked = record(case, Path(folder, "run"))

        def scored(hold: Hold) -> culpa.Scores:
            exact = culpa.Exact()
            return culpa.attribute(run, problem, asked, propagator=exact, examples=True, hold=hold)

        exact = scored(culpa.InMemory())
        others = {"bfloat16": scored(culpa.InMemory(dtype=HALF))}
        with suppress(culpa.UnsupportedError):  # running statistics no longer follow from the state
            others["states rounded"] = scored(Rounded())
    found: dict[str, Any] = {"case": case.name, "updates": run.num_steps}
    found["growth"] = max(t.growth for t in exact.trust)
    for name, scores in others.items():
        assert scores.examples is not None
        assert exact.examples is not None
        found[name] = {
            "steps": distance(scores.steps, exact.steps),
            "stages": distance(scores.stages, exact.stages),
            "examples": distance(scores.examples, exact.examples),
            "grades changed": sum(
                a.grade != b.grade for a, b in zip(scores.trust, exact.trust, strict=True)
            ),
        }
    return found


class Watched:
    """A ``culpa.progress`` that notes the most bytes that lie in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.most = folder, 0

    def start(self, what: str, total: int) -> None:
        """See ``culpa.progress``."""

    def advance(self, units: int = 1) -> None:
        """See ``culpa.progress``."""
        there = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
        self.most = max(self.most, there)

    def finish(self) -> None:
        """See ``culpa.progress``."""


def room(where: str) -> dict[str, int]:
    """Bytes above what is held before the sweep, and on disk, in this process."""
    with tempfile.TemporaryDirectory() as name:
        folder, scratch = Path(name, "run"), Path(name, "scratch")
        scratch.mkdir()
        run, problem, asked = record(LARGE, folder)
        watched, hold = Watched(scratch), ROOMS[where](scratch)
        return {
            "memory": peak(
                lambda: culpa.attribute(run, problem, asked[:1], hold=hold, progress=watched)
            ),
            "disk": watched.most,
        }


def rooms() -> dict[str, dict[str, int]]:
    """Each in a process of its own."""
    found: dict[str, dict[str, int]] = {}
    for where in ROOMS:
        command = [sys.executable, __file__, "--room", where]
        found[where] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        print(where, found[where], file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(CASES)))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--room", choices=list(ROOMS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.room:
        print(json.dumps(room(given.room)))
        return
    scores: list[dict[str, Any]] = []
    for number in given.cases:
        scores.append(compared(CASES[number]))
        print(scores[-1], file=sys.stderr, flush=True)
    result = {
        "what": "distance of scores from those of updates that wait as they are, by their norm",
        "machine": machine(),
        "scores": scores,
        "parameters": sum(p.numel() for p in LARGE.model().parameters()),
        "updates waiting": LARGE.each,
        "bytes": rooms(),
    }
    print(json.dumps(result, indent=1))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
