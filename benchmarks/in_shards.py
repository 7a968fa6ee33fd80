"""What a rank holds while it trains, records, replays and attributes a model of ``fully_shard``.

    python benchmarks/in_shards.py [--out benchmarks/results/in_shards.json]

A stack of ``LAYERS`` equal layers with AdamW under FSDP2, on two and on four ranks of this machine
(gloo): by how much each job raises the peak of resident memory of a rank, in units of the model's
parameters, each in processes of its own. "whole" is ``culpa.across_ranks()``, "in shards"
``culpa.across_ranks(shard=True)`` with the model on the meta device. Beside it the processor time
of all ranks together, in units of plain training. A page that is mapped from a file counts as
resident until somebody needs it, and so do the states of the run that is read.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from spent import peak
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss

import culpa
from culpa.experiments.frame.machine import machine

WIDTH, LAYERS, ROWS, UPDATES = 768, 24, 32, 6
STAGES = ("first", "second")
RANKS = (2, 4)
Batch = tuple[Tensor, Tensor]


class Layer(nn.Module):
    """x + W gelu(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """As the class says."""
        return x + self.linear(nn.functional.gelu(x))


def model() -> nn.Sequential:
    """Its parameters are ``LAYERS`` times a square matrix and a bias."""
    torch.manual_seed(0)
    return nn.Sequential(*(Layer() for _ in range(LAYERS)))


def nowhere() -> nn.Module:
    """The same without values."""
    with torch.device("meta"):
        return model()


def loss(net: nn.Module, batch: Batch) -> Tensor:
    """A regression."""
    return mse_loss(net(batch[0]), batch[1])


def batches(stage: int, rank: int) -> Iterator[Batch]:
    """Of one stage and rank."""
    generator = torch.Generator().manual_seed(100 * stage + rank)
    for _ in range(UPDATES):
        yield (
            torch.randn(ROWS, WIDTH, generator=generator),
            torch.randn(ROWS, WIDTH, generator=generator),
        )


def train(rank: int, path: Path | None) -> None:
    """Two stages under FSDP2, recorded or not."""
    net: Any = model()
    for layer in net:
        fully_shard(layer)
    fully_shard(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    recording = (
        nullcontext()
        if path is None
        else culpa.record(path, culpa.Problem(net, loss), optimizer, overwrite=True)
    )
    with recording as recorder:
        for number, name in enumerate(STAGES):
            drawn = batches(number, rank)
            with nullcontext() if recorder is None else recorder.stage(name):
                for batch in drawn if recorder is None else recorder.batches(drawn):
                    optimizer.zero_grad()
                    loss(net, batch).backward()
                    optimizer.step()


def replay(path: Path, shard: bool) -> None:
    """Without the first stage."""
    problem = culpa.Problem(nowhere() if shard else model(), loss)
    with culpa.across_ranks(shard=shard):
        culpa.replay(culpa.open_run(path), problem, without=STAGES[0])


def attribute(path: Path, shard: bool) -> None:
    """One behaviour, exact."""
    problem = culpa.Problem(nowhere() if shard else model(), loss)
    behaviour = culpa.Behaviour(
        "error", lambda m, b: -((m(b[0]) - b[1]) ** 2).mean(1), next(batches(9, 0))
    )
    with culpa.across_ranks(shard=shard), tempfile.TemporaryDirectory(dir=path.parent) as room:
        hold = culpa.OnDisk(Path(room))
        exact = culpa.Exact()
        culpa.attribute(culpa.open_run(path), problem, [behaviour], propagator=exact, hold=hold)


JOBS: dict[str, Callable[[int, Path], None]] = {
    "plain training": lambda rank, _: train(rank, None),
    "recorded": train,
    "replay, whole": lambda _, path: replay(path, shard=False),
    "replay, in shards": lambda _, path: replay(path, shard=True),
    "attribute, whole": lambda _, path: attribute(path, shard=False),
    "attribute, in shards": lambda _, path: attribute(path, shard=True),
}


def work(job: str, rank: int, ranks: int, store: str, path: Path, sender: Any) -> None:
    """One rank's process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    dist.barrier()
    began = time.process_time()
    raised = peak(lambda: JOBS[job](rank, path))
    sender.send((raised, time.process_time() - began))
    dist.barrier()


def measured(job: str, ranks: int, folder: Path) -> list[tuple[int, float]]:
    """Of every rank: bytes that the job raises the peak by, and seconds of processor time."""
    context = multiprocessing.get_context("spawn")
    store = f"file://{folder / f'store {ranks} {job}'}"
    receivers, processes = [], []
    for rank in range(ranks):
        receiver, sender = context.Pipe(duplex=False)
        given = (job, rank, ranks, store, folder / f"run {ranks}", sender)
        process = context.Process(target=work, args=given)
        process.start()
        receivers.append(receiver)
        processes.append(process)
    found = [receiver.recv() for receiver in receivers]
    for process in processes:
        process.join()
    return found


def main() -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    size = sum(p.nbytes for p in nowhere().parameters())
    rows: list[dict[str, Any]] = []
    load = machine()
    for ranks in RANKS:
        with tempfile.TemporaryDirectory() as folder:
            unit = 0.0
            for job in JOBS:
                found = measured(job, ranks, Path(folder))
                seconds = sum(spent for _, spent in found)
                unit = unit or seconds
                memory = [raised / size for raised, _ in found]
                rows.append(
                    {
                        "ranks": ranks,
                        "job": job,
                        "first rank": memory[0],
                        "other ranks, most": max(memory[1:]),
                        "time": seconds / unit,
                    }
                )
                print(rows[-1], flush=True)
    result = {
        "what": "peak resident memory beyond the start, in sizes of the parameters; processor time"
        " of all ranks, in plain trainings",
        "machine": load,
        "parameter bytes": size,
        "updates": UPDATES * len(STAGES),
        "rows": rows,
    }
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
