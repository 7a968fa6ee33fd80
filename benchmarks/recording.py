"""What recording costs: time against the same loop without it, and bytes against every state.

    python benchmarks/recording.py [--repeats 5] [--out benchmarks/results/recording.json]

Plain and recorded training alternate in one process, each from the same seed; a ratio is the median
over pairs. The recorded time is that of the whole block: opening the folder, executing the first
update of each stage twice, hashing, writing, closing. ``loop`` leaves opening and closing out;
``cpu`` is the training thread's own processor time in the loops, which a busy machine disturbs
least; ``beside`` is the processor time of the thread that writes, per update.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import culpa
from culpa.experiments import demo
from culpa.trajectory import environment

Batch = tuple[Tensor, Tensor]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """What all of these loops minimise."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@dataclass(frozen=True)
class Case:
    """A training loop: ``stages`` yields a name and the batches of each stage."""

    name: str
    model: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    stages: Callable[[], Iterator[tuple[str, Iterable[Batch]]]]


def mlp() -> nn.Module:
    """784-128-128-10."""
    return nn.Sequential(
        nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(into, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        same = into == out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(into, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """f(x) + x."""
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet8() -> nn.Module:
    """Three blocks of 16, 32 and 64 channels on 32 x 32 images."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Residual(16, 16, 1),
        Residual(16, 32, 2),
        Residual(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


class Adapted(nn.Module):
    """A frozen linear map and one of rank 8 beside it, which trains."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.frozen = nn.Linear(into, out)
        self.frozen.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(8, into) / into**0.5)
        self.up = nn.Parameter(torch.zeros(out, 8))

    def forward(self, x: Tensor) -> Tensor:
        """W x + b + U D x."""
        return self.frozen(x) + x @ self.down.T @ self.up.T


class Block(nn.Module):
    """Attention of four heads and an MLP, with adapters at all of their maps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2)).requires_grad_(False)
        self.into, self.out = Adapted(width, 3 * width), Adapted(width, width)
        self.mlp = nn.Sequential(Adapted(width, 4 * width), nn.GELU(), Adapted(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, width] -> the same."""
        parts = self.into(self.norms[0](x)).chunk(3, -1)
        heads = [part.unflatten(-1, (4, -1)).transpose(1, 2) for part in parts]
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norms[1](x))


class LoRA(nn.Module):
    """Four blocks of width 192 that tell ten classes apart by the last token, adapters alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 192).requires_grad_(False)
        self.blocks = nn.Sequential(*(Block(192) for _ in range(4)))
        self.head = nn.Linear(192, 10).requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, length] -> [batch, 10]."""
        return self.head(self.blocks(self.embedding(tokens))[:, -1])


def texts(examples: int, size: int, count: int) -> Iterator[tuple[str, Iterable[Batch]]]:
    """Shuffled epochs over made-up sequences of 64 tokens."""
    data = torch.randint(0, 1000, (examples, 64)), torch.randint(0, 10, (examples,))

    def batches() -> Iterator[Batch]:
        for _ in range(count):
            for rows in torch.randperm(examples).split(size):
                yield data[0][rows], data[1][rows]

    yield "fine-tuning", batches()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Of what requires a gradient."""
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)


def epochs(
    shape: tuple[int, ...], examples: int, size: int, count: int
) -> Iterator[tuple[str, Iterable[Batch]]]:
    """Shuffled epochs over made-up images, one stage."""
    data = torch.randn(examples, *shape), torch.randint(0, 10, (examples,))

    def batches() -> Iterator[Batch]:
        for _ in range(count):
            for rows in torch.randperm(examples).split(size):
                yield data[0][rows], data[1][rows]

    yield "training", batches()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """With momentum."""
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def demo_stages() -> Iterator[tuple[str, Iterable[Batch]]]:
    """The four stages of ``culpa demo``, through its loaders."""
    for name, images, labels, count in demo._pipeline():  # pyright: ignore[reportPrivateUsage]
        yield name, _repeated(images, labels, count)


def _repeated(images: Tensor, labels: Tensor, count: int) -> Iterator[Batch]:
    for _ in range(count):
        yield from demo._shuffled(images.flatten(1), labels)  # pyright: ignore[reportPrivateUsage]


CASES = (
    Case("MLP 784-128-128-10, batch 100", mlp, sgd, lambda: epochs((784,), 10_000, 100, 40)),
    Case("ResNet-8, 32 x 32, batch 64", resnet8, sgd, lambda: epochs((3, 32, 32), 640, 64, 6)),
    Case("LoRA of rank 8, AdamW, batch 16", LoRA, adamw, lambda: texts(160, 16, 3)),
    Case("the demo's loop", lambda: demo.problem()[0].model, sgd, demo_stages),
)


class Spent(NamedTuple):
    """Seconds: of the whole, the loops, the training thread's processor there, other threads'."""

    whole: float
    loop: float
    cpu: float
    beside: float


def train(case: Case, path: Path | None) -> Spent:
    """Train; recorded if there is a path."""
    torch.manual_seed(0)
    model = case.model()
    optimizer, stages = case.optimizer(model), list(case.stages())
    looped = used = 0.0
    elsewhere, began = _elsewhere(), time.perf_counter()
    context: Any = nullcontext()
    if path is not None:
        context = culpa.record(path, culpa.Problem(model, loss), optimizer)
    with context as recorder:
        for name, batches in stages:
            entered, at = time.perf_counter(), time.thread_time()
            with recorder.stage(name) if recorder else nullcontext():
                for batch in recorder.batches(batches) if recorder else batches:
                    optimizer.zero_grad()
                    loss(model, batch).backward()
                    optimizer.step()
            looped += time.perf_counter() - entered
            used += time.thread_time() - at
    return Spent(time.perf_counter() - began, looped, used, _elsewhere() - elsewhere)


def _elsewhere() -> float:
    """Processor time of other threads."""
    return time.process_time() - time.thread_time()


def measure(case: Case, threads: int, repeats: int) -> dict[str, Any]:
    """Alternate plain and recorded training after one of each to warm up."""
    torch.set_num_threads(threads)
    plain: list[Spent] = []
    recorded: list[Spent] = []
    with tempfile.TemporaryDirectory() as folder:
        for at in range(repeats + 1):
            plain.append(train(case, None))
            recorded.append(train(case, Path(folder, str(at))))
        run = culpa.open_run(Path(folder, str(repeats)))
        parts, updates, kept = run.bytes_by_part(), run.num_steps, len(run.kept_states)
        state = len(run.state(updates).encode())
    pairs = list(zip(plain[1:], recorded[1:], strict=True))
    whole = [r.whole / p.whole for p, r in pairs]
    every = state * (updates + 1)
    return {
        "case": case.name,
        "threads": threads,
        "updates": updates,
        "repeats": repeats,
        "plain_seconds": _median(p.whole for p in plain[1:]),
        "recorded_seconds": _median(r.whole for r in recorded[1:]),
        "ratio": _median(whole),
        "ratio_range": [round(min(whole), 3), round(max(whole), 3)],
        "ratio_loop": _median(r.loop / p.loop for p, r in pairs),
        "ratio_cpu_of_training_thread": _median(r.cpu / p.cpu for p, r in pairs),
        "plain_microseconds_cpu": round(1e6 * min(p.cpu for p in plain[1:]) / updates, 1),
        "recorded_microseconds_cpu": round(1e6 * min(r.cpu for r in recorded[1:]) / updates, 1),
        "beside_microseconds_cpu": round(1e6 * min(r.beside for r in recorded[1:]) / updates, 1),
        "bytes": parts,
        "bytes_total": sum(parts.values()),
        "kept_states": kept,
        "most_states": round(2 * updates**0.5 + 4, 1),
        "bytes_of_a_state": state,
        "bytes_of_every_state": every,
        "states_to_every_state": round(parts["states"] / every, 4),
        "total_to_every_state": round(sum(parts.values()) / every, 4),
    }


def _median(values: Iterable[float]) -> float:
    return round(statistics.median(values), 4)


def main() -> None:
    """Measure every case with one thread and with two."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", type=int, nargs="+", default=range(len(CASES)))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recording.json"))
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    machine = environment.capture() | {"cores": str(os.cpu_count())}
    content = {
        "what": "recorded against plain training, alternating in one process",
        "culpa": culpa.__version__,
        "machine": machine,
        "results": results,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for threads in options.threads:
        for case in [CASES[number] for number in options.cases]:
            load = os.getloadavg()[0]  # more than ours of the cores: a ratio to mistrust
            found = measure(case, threads, options.repeats) | {"load_before": round(load, 2)}
            results.append(found)
            options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            sys.stdout.write(
                f"{case.name}, {threads} thread(s): {found['ratio']:.2f} times plain"
                f" ({found['ratio_loop']:.2f} in the loop,"
                f" {found['ratio_cpu_of_training_thread']:.2f} in the training thread's processor"
                f" time),"
                f" {found['bytes_total'] / 1e6:.1f} MB,"
                f" {found['total_to_every_state']:.2f} of every state\n"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
