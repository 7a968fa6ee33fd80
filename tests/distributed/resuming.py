"""A job of several ranks that can die and go on: nothing here knows how culpa does it."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler

import culpa

Progress = Callable[[int, int], None]
EPOCHS, ROWS, BATCH = 2, 48, 4
STAGES = ("plain", "augmented")


class Noisy(Dataset):
    """Items augmented with numbers of the global generators, as they are drawn."""

    def __init__(self, noise: float) -> None:
        generator = torch.Generator().manual_seed(8)
        self.inputs = torch.randn(ROWS, 6, generator=generator)
        self.targets = (self.inputs.sum(1) > 0).long()
        self.noise = noise

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs = self.inputs[index]
        if self.noise:
            inputs = inputs + self.noise * torch.randn(6) + 0.01 * random.random()
        return inputs, self.targets[index]


def loss(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def build() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.GELU(), nn.Linear(16, 2)
    )


def updates(ranks: int) -> int:
    """Of a job."""
    batches = ROWS // ranks // BATCH
    return EPOCHS * (batches + batches // 2)


def train(
    rank: int,
    ranks: int,
    path: Path | None,
    progress: Progress = lambda k, rank: None,
    start: dict[str, Tensor] | None = None,
    seed: int = 50,
    lr: float = 0.01,
    **options: Any,
) -> dict[str, Tensor]:
    """Dropout, batch norm, AdamW, a sampler that shuffles over the ranks, then one of each rank's.

    The items of the second stage are augmented, two batches of them an update; the learning rate
    follows a cosine, and evaluation in between draws. ``start``: the weights it begins with;
    ``progress``: called with the updates made.
    """
    model = build()
    if start is not None:
        model.load_state_dict(start)
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.0002)  # several buckets
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    scheduler = CosineAnnealingLR(optimizer, T_max=7)
    torch.manual_seed(seed + rank)
    random.seed(seed + rank)
    options = {"durability": culpa.Durability(seconds=60.0, updates=12), **options}
    recording = (
        nullcontext()
        if path is None
        else culpa.record(
            path, culpa.Problem(wrapped, loss), optimizer, scheduler=scheduler, **options
        )
    )
    done = 0
    with recording as recorder:
        for name, noise in zip(STAGES, (0.0, 0.1), strict=True):
            named = f"{name}, lr {lr}"
            data = Noisy(noise)
            each = len(DistributedSampler(data, ranks, rank))
            sampler = (
                RandomSampler(data, num_samples=each)
                if noise
                else DistributedSampler(data, ranks, rank, seed=3)
            )
            loader = DataLoader(data, batch_size=BATCH, sampler=sampler, drop_last=True)
            with nullcontext() if recorder is None else recorder.stage(named):
                for epoch in range(EPOCHS):
                    if not noise:
                        sampler.set_epoch(epoch)
                    drawn = loader if recorder is None else recorder.batches(loader)
                    for at, batch in enumerate(drawn):
                        last = not noise or at % 2 == 1
                        model.train()
                        with nullcontext() if last else wrapped.no_sync():
                            value = loss(wrapped, batch)
                            (value / 2 if noise else value).backward()
                        if not last:
                            continue
                        optimizer.step()
                        optimizer.zero_grad()
                        done = done + 1 if recorder is None else recorder.num_steps
                        progress(done, rank)
                        scheduler.step()
                        if random.random() < 0.2:  # an evaluation that draws
                            model.eval()
                            model(torch.randn(3, 6))
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
