"""What culpa costs on a GPU: adapters on a decoder of 400 million parameters of random weights.

    python benchmarks/gpu.py [--dtype bfloat16] [--repeats 5] [--out benchmarks/results/gpu.json]
    python benchmarks/gpu.py --parameters 1e6 --device cpu      # the same, small, without one

A frozen decoder with adapters of rank 8 on queries and values (parameters.py), AdamW, two stages,
recorded with ``frozen="reference"`` under deterministic settings. The plain loop, recording,
``culpa.replay`` of the whole run (which compares every update bit for bit; the final state is
compared with the plain loop's besides), and ``culpa.attribute`` with exact products for one
behaviour, of updates that wait on the device, in the machine's memory, and there in bfloat16.

All run in turn, ``--repeats`` rounds after one to warm up; ratios are those to the plain loop of
the same round, of which the medians are told. Seconds are wall time of a synchronised device (on
the CPU processor time); memory is ``torch.cuda.max_memory_allocated`` (on the CPU none is told:
parameters.py measures it there, in processes of their own).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from parameters import SHAPES, WORDS, Decoder
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import culpa
from culpa.trajectory import environment

LARGE = {4e8: (1024, 29)}
"""Width and depth, beside those of parameters.py."""
HEAD = 64
HOLDS: dict[str, Any] = {
    "attribute": None,
    "attribute, waiting on the CPU": culpa.OnCpu(),
    "attribute, waiting on the CPU in bfloat16": culpa.OnCpu(torch.bfloat16),
}
WAYS = ("plain", "record", "replay", *HOLDS)
Spent = dict[str, float]


@dataclass(frozen=True)
class Case:
    """One training run on one device; ``dtype``: what its matrix products are computed in."""

    parameters: float
    device: torch.device
    dtype: torch.dtype
    updates: int
    batch: int
    tokens: int

    def model(self) -> nn.Module:
        """The same at every call."""
        torch.manual_seed(0)
        shapes = SHAPES | LARGE
        width, depth = shapes[min(shapes, key=lambda size: abs(size / self.parameters - 1.0))]
        head = HEAD if width % HEAD == 0 else 16
        return Decoder(width, depth, head).to(self.device)

    def data(self, count: int, seed: int) -> list[Tensor]:
        """Random words."""
        generator = torch.Generator().manual_seed(seed)
        shape = (count, self.batch, self.tokens + 1)
        return list(torch.randint(WORDS, shape, generator=generator).to(self.device))

    def losses(self, model: nn.Module, words: Tensor) -> Tensor:
        """Cross-entropy of the next word, of each sequence."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            logits = model(words[:, :-1])
        # Of flat rows: the kernel for [batch, words, tokens] is not deterministic on CUDA.
        rows = cross_entropy(logits.float().flatten(0, 1), words[:, 1:].flatten(), reduction="none")
        return rows.unflatten(0, (len(words), -1)).mean(1)

    def loss(self, model: nn.Module, words: Tensor) -> Tensor:
        """The mean."""
        return self.losses(model, words).mean()


def deterministic() -> None:
    """What bitwise replay needs; before anything is computed on the device."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


class Loop:
    """The training loop of one model, again and again from the same adapters."""

    def __init__(self, case: Case) -> None:
        self.case, self.model = case, case.model()
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self._initial = self.adapters()
        half = case.updates // 2
        self._stages = {"one": case.data(half, 1), "two": case.data(half, 2)}
        self.problem = culpa.Problem(self.model, case.loss)
        self.asked = [culpa.Behaviour("test", lambda m, w: -case.losses(m, w), case.data(1, 3)[0])]

    def adapters(self) -> dict[str, Tensor]:
        """A copy of what trains."""
        return {n: p.detach().clone() for n, p in self.trained.items()}

    def begin(self) -> torch.optim.Optimizer:
        """From the start."""
        with torch.no_grad():
            for name, p in self.trained.items():
                p.copy_(self._initial[name])
        self.model.zero_grad()
        return torch.optim.AdamW(self.trained.values(), lr=1e-3)

    def _update(self, optimizer: torch.optim.Optimizer, words: Tensor) -> None:
        optimizer.zero_grad()
        self.case.loss(self.model, words).backward()
        optimizer.step()

    def plain(self, optimizer: torch.optim.Optimizer) -> None:
        """Nothing around it."""
        for batches in self._stages.values():
            for words in batches:
                self._update(optimizer, words)

    def record(self, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        """The same, recorded."""
        how: Any = {"checkpoints": culpa.AtStages(), "frozen": "reference"}
        with culpa.record(folder, self.problem, optimizer, **how) as recorder:
            for name, batches in self._stages.items():
                with recorder.stage(name):
                    for words in recorder.batches(batches):
                        self._update(optimizer, words)


def measured(case: Case, work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What ``work`` returns, its seconds and its peak of bytes on the device (nan without one)."""
    cuda = case.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    clock = time.perf_counter if cuda else time.process_time
    began = clock()
    made = work()
    if cuda:
        torch.cuda.synchronize()
    took = clock() - began
    return made, took, float(torch.cuda.max_memory_allocated()) if cuda else float("nan")


def once(loop: Loop) -> tuple[Spent, Spent, dict[str, bool | str]]:
    """Seconds and bytes of every way, and whether the bits are the same."""
    seconds, memory = Spent(), Spent()

    def note(way: str, work: Callable[[], Any]) -> Any:
        made, seconds[way], memory[way] = measured(loop.case, work)
        return made

    with tempfile.TemporaryDirectory(prefix="culpa-bench-") as name:
        folder = Path(name, "run")
        note("plain", partial(loop.plain, loop.begin()))
        plain = loop.adapters()
        note("record", partial(loop.record, loop.begin(), folder))
        recorded = loop.adapters()
        run = culpa.open_run(folder)
        again = note("replay", partial(culpa.replay, run, loop.problem))
        for way, hold in HOLDS.items():
            note(way, partial(culpa.attribute, run, loop.problem, loop.asked, hold=hold))
    same: dict[str, bool | str] = {
        "recorded as trained without culpa": all(torch.equal(plain[n], recorded[n]) for n in plain),
        "replayed": all(torch.equal(p, again.state[n].to(p.device)) for n, p in plain.items()),
        "claim": again.claim,
    }
    return seconds, memory, same


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parameters", type=float, default=4e8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--updates", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "There is no CUDA device here, or this torch is built without CUDA. The same in small"
            " without one: python benchmarks/gpu.py --parameters 1e6 --device cpu --tokens 64"
        )
    if given.updates < 2 or given.updates % 2:
        parser.error(f"--updates is an even number, for two stages; got {given.updates}")
    deterministic()
    if device.type == "cpu":
        torch.set_num_threads(1)
    dtype = getattr(torch, given.dtype)
    case = Case(given.parameters, device, dtype, given.updates, given.batch, given.tokens)
    loop = Loop(case)
    rounds = [once(loop) for _ in range(given.repeats + 1)][1:]
    tensors = list(loop.model.parameters())
    cuda = device.type == "cuda"
    result = {
        "what": "adapters on a frozen decoder: medians of ratios to the plain loop, by round",
        "culpa": culpa.__version__,
        "machine": environment.capture(tensors),
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "parameters": sum(p.numel() for p in tensors),
        "trained": sum(p.numel() for p in tensors if p.requires_grad),
        "dtype": given.dtype,
        "updates": given.updates,
        "tokens an update": given.batch * given.tokens,
        "rounds": given.repeats,
        "plain seconds an update": statistics.median(r[0]["plain"] for r in rounds) / given.updates,
        "bytes of plain training": statistics.median(r[1]["plain"] for r in rounds) if cuda else 0,
        "bitwise": rounds[-1][2],
        "time": {w: middle([s[w] / s["plain"] for s, _, _ in rounds]) for w in WAYS[1:]},
        "memory": {w: middle([m[w] / m["plain"] for _, m, _ in rounds]) for w in WAYS[1:]}
        if cuda
        else {},
    }
    print(json.dumps(result, indent=1))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def middle(values: list[float]) -> list[float]:
    """The median, the least and the largest."""
    return [round(x, 3) for x in (statistics.median(values), min(values), max(values))]


if __name__ == "__main__":
    main()
