"""Real processes, joined by gloo over a file: what ``torchrun`` starts, without its start-up."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # DistributedDataParallel imports it when it is made: once, before the fork
import torch.distributed as dist

import culpa.trajectory.record  # and these: importing them under the test hook takes seconds
import culpa.trajectory.replay  # noqa: F401


def run_ranks(size: int, folder: Path, work: Callable[[int], Any]) -> list[Any]:
    """What ``work(rank)`` returned in each of ``size`` processes; raises what one of them did."""

    def together(rank: int) -> Any:
        result = work(rank)
        dist.barrier()  # who leaves first cuts the others off
        return result

    found = outcomes(size, folder, together)
    for one in found:
        if isinstance(one, Exception):
            raise one
    return found


def outcomes(
    size: int, folder: Path, work: Callable[[int], Any], *, wait: float = 120
) -> list[Any]:
    """As ``run_ranks``, with the exceptions; a process that was killed returns ``None``.

    Forked: importing torch and culpa anew would take most of the time of every test.
    """
    folder.mkdir(parents=True, exist_ok=True)
    store = folder / f"store-{len(list(folder.iterdir()))}"
    context = multiprocessing.get_context("fork")
    pipes, processes = [], []
    for rank in range(size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_main, args=(rank, size, store, work, sender))
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    found = []
    for receiver, process in zip(pipes, processes, strict=True):
        try:
            known = receiver.poll(wait)
            found.append(pickle.loads(receiver.recv_bytes()) if known else TimeoutError())
        except EOFError:
            found.append(None)
        process.join(5)
        if process.is_alive():
            process.kill()
    return found


def _main(rank: int, size: int, store: Path, work: Callable[[int], Any], sender: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        result = work(rank)
    except Exception as error:  # noqa: BLE001 (the test looks at it)
        result = error
    sender.send_bytes(pickle.dumps(result))  # tensors by value: `send` would share their memory
    sender.close()
