"""A recording process that can be killed, and what must be true of what it leaves."""

from __future__ import annotations

import mmap
import os
import random
import signal
import struct
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # optimizers import it when first made: here, once for all children
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, Dataset

import culpa
from culpa.trajectory import digest

UPDATES = 12
"""At most so many may be lost (Durability), besides the one that was being made."""


class Noisy(Dataset):
    """Items that are augmented with numbers of the global generator, as they are drawn."""

    def __init__(self, rows: int, noise: float) -> None:
        self.inputs = torch.randn(rows, 6)  # also from the global generator: code between loops
        self.targets = (self.inputs.sum(1) > 0).long()
        self.noise = noise

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs = self.inputs[index]
        if self.noise:
            inputs = inputs + self.noise * torch.randn(6)
        return inputs, self.targets[index]


def loss(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def train(
    path: Path | None,
    progress: Callable[[int], None] = lambda k: None,
    epochs: int = 5,
    **options: Any,
) -> dict[str, Tensor]:
    """Dropout, batch norm, AdamW, shuffling, augmentation, a scheduler, evaluation in between."""
    torch.manual_seed(4)
    random.seed(4)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 2)
    )
    optimizer = AdamW(model.parameters(), lr=0.01)
    scheduler = CosineAnnealingLR(optimizer, T_max=7)
    options = {"durability": culpa.Durability(seconds=60.0, updates=UPDATES), **options}
    problem = culpa.Problem(model, loss)
    with culpa.record(path, problem, optimizer, scheduler=scheduler, **options) as recorder:
        for name, noise in (("plain", 0.0), ("augmented", 0.1), ("again", 0.0)):
            loader = DataLoader(Noisy(40, noise), batch_size=8, shuffle=True)
            with recorder.stage(name):
                for _ in range(epochs):
                    for batch in recorder.batches(loader):
                        model.train()
                        optimizer.zero_grad()
                        loss(model, batch).backward()
                        optimizer.step()
                        progress(recorder.num_steps)
                        scheduler.step()
                        if random.random() < 0.2:  # an evaluation that draws
                            model.eval()
                            model(torch.randn(3, 6))
    return dict(model.state_dict())


STEPS = 3 * 5 * 5


def fingerprint(tensors: dict[str, Tensor]) -> bytes:
    return digest.combine(digest.tensor_digests(tensors))


class Shared:
    """A number and 32 bytes that a child leaves to its parent, whatever becomes of it."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 64)

    def count(self, k: int) -> None:
        self.memory[:8] = struct.pack("q", k)

    @property
    def counted(self) -> int:
        return struct.unpack("q", self.memory[:8])[0]

    def leave(self, data: bytes) -> None:
        self.memory[16:48] = data

    @property
    def left(self) -> bytes:
        return self.memory[16:48]


def fork(work: Callable[[Shared], None]) -> tuple[int, Shared]:
    """Run ``work`` in a child, torch already imported; its id and what it shares."""
    shared = Shared()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            work(shared)
            status = 0
        except BaseException:  # noqa: BLE001 (told by the status)
            traceback.print_exc()
        finally:
            os._exit(status)
    return child, shared


def finish(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def recording(path: Path, **options: Any) -> Callable[[Shared], None]:
    def work(shared: Shared) -> None:
        try:
            shared.leave(fingerprint(train(path, shared.count, resume=True, **options)))
        except culpa.StoreError:  # killed when only the manifest was still to be written
            run = culpa.open_run(path)
            if run.manifest.status != "complete":
                raise
            shared.leave(fingerprint({**run.final_state(), **run.final_buffers()}))

    return work


@dataclass
class Undisturbed:
    """A run that nobody killed: the digest of its final state, and how long it took."""

    final: bytes
    seconds: float


def undisturbed(path: Path, **options: Any) -> Undisturbed:
    began = time.monotonic()
    child, shared = fork(recording(path, **options))
    assert finish(child) == 0
    return Undisturbed(shared.left, time.monotonic() - began)


@dataclass
class Tally:
    """What became of many kills."""

    kills: int = 0
    finished: int = 0
    """Lives whose process was done before its kill came."""
    unborn: int = 0
    """Kills before there was a run."""
    most_lost: int = 0
    resumed: int = 0


def life(
    path: Path, truth: Undisturbed, chance: random.Random, tally: Tally, **options: Any
) -> None:
    """Record, be killed, resume, be killed again ... until it is done; check after every kill."""
    while True:
        child, shared = fork(recording(path, **options))
        time.sleep(truth.seconds * chance.random())
        os.kill(child, signal.SIGKILL)
        status = finish(child)
        if status != -signal.SIGKILL:
            assert status == 0, "the recording failed by itself"
            tally.finished += 1
            assert shared.left == truth.final
            return
        tally.kills += 1
        if not check(path, shared.counted, tally):
            continue
        if chance.random() < 0.5:
            child, shared = fork(recording(path, **options))
            assert finish(child) == 0, "the resumed recording failed"
            assert shared.left == truth.final, "the final state is not the undisturbed one"
            tally.resumed += 1
            run = culpa.open_run(path)
            assert run.verify(level="digest").finished
            state = {**run.final_state(), **run.final_buffers()}
            assert fingerprint(state) == truth.final
            return


def check(path: Path, done: int, tally: Tally) -> bool:
    """What a kill left opens, is whole and lacks no more than it may; False: nothing was there."""
    if not (path / "culpa.json").exists():
        assert done == 0
        tally.unborn += 1
        return False
    run = culpa.open_run(path)
    if run.manifest.status == "complete":  # killed between the last write and its exit
        assert run.num_steps == STEPS
        run.verify(level="digest")
        for file in sorted(path.rglob("*"), reverse=True):
            file.rmdir() if file.is_dir() else file.unlink()
        path.rmdir()
        return False
    run.verify(level="digest")
    lost = max(0, done - run.num_steps)
    assert lost <= UPDATES, f"{done} updates were made, {run.num_steps} are there"
    tally.most_lost = max(tally.most_lost, lost)
    return True
