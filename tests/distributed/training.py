"""Plain DistributedDataParallel training, recorded or not: nothing here knows how culpa does it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import culpa

STAGES = ("first", "second", "third")
Batch = tuple[Tensor, Tensor]


class Case:
    """A small training job on several ranks.

    Args:
        dropout, batch_norm, dtype: of the model.
        accumulate: micro-batches a rank and update, all but the last under ``no_sync``.
        clip: norm to clip gradients to.
        updates: of each stage.
        optimizer: made of the parameters.
    """

    def __init__(
        self,
        *,
        dropout: float = 0.0,
        batch_norm: bool = False,
        dtype: torch.dtype = torch.float32,
        accumulate: int = 1,
        clip: float | None = None,
        updates: int = 4,
        rows: int = 5,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    ) -> None:
        self.dropout, self.batch_norm, self.dtype = dropout, batch_norm, dtype
        self.accumulate, self.clip, self.updates, self.rows = accumulate, clip, updates, rows
        self.optimizer = optimizer or (lambda params: torch.optim.AdamW(params, lr=1e-2))

    def model(self) -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Linear(6, 16, bias=not self.batch_norm),
            nn.BatchNorm1d(16) if self.batch_norm else nn.Identity(),
            nn.GELU(),
            nn.Dropout(self.dropout),
            nn.Linear(16, 8),
            nn.GELU(),
            nn.Linear(8, 3),
        ).to(self.dtype)

    def problem(self, model: nn.Module) -> culpa.Problem:
        return culpa.Problem(model, loss, example_losses)

    def batches(self, rank: int, stage: int) -> list[Batch]:
        generator = torch.Generator().manual_seed(1000 * stage + rank)
        return [
            (
                torch.randn(self.rows, 6, generator=generator).to(self.dtype),
                torch.randint(0, 3, (self.rows,), generator=generator),
            )
            for _ in range(self.updates * self.accumulate)
        ]

    def train(
        self, rank: int, path: Path | None = None, skip: Collection[int] = (), **options: Any
    ) -> dict[str, Tensor]:
        """The state that training ends with; recorded if there is a ``path``.

        ``skip``: updates that are not executed, which only plain training can leave out.
        """
        model = self.model()
        # Buckets so small that the few parameters fill several.
        wrapped = DistributedDataParallel(model, bucket_cap_mb=0.0005)
        optimizer = self.optimizer(model.parameters())
        torch.manual_seed(50 + rank)
        recording = (
            nullcontext()
            if path is None
            else culpa.record(
                path, self.problem(wrapped), optimizer, clip_grad_norm=self.clip, **options
            )
        )
        with recording as recorder:
            for number, name in enumerate(STAGES):
                with nullcontext() if recorder is None else recorder.stage(name):
                    loader = self.batches(rank, number)
                    drawn = loader if recorder is None else recorder.batches(loader)
                    for i, batch in enumerate(drawn):
                        index = number * self.updates + i // self.accumulate
                        if index not in skip:
                            self._micro_batch(wrapped, optimizer, batch, i)
                        elif self.dropout:
                            model(batch[0])  # later updates draw the masks that they drew
        return {name: value.detach().clone() for name, value in model.state_dict().items()}

    def _micro_batch(
        self, wrapped: Any, optimizer: torch.optim.Optimizer, batch: Batch, i: int
    ) -> None:
        last = (i + 1) % self.accumulate == 0
        with nullcontext() if last else wrapped.no_sync():
            value = loss(wrapped, batch)
            (value / self.accumulate if self.accumulate > 1 else value).backward()
        if last:
            if self.clip is not None:
                nn.utils.clip_grad_norm_(wrapped.parameters(), self.clip)
            optimizer.step()
            optimizer.zero_grad()

    def behaviour(self) -> culpa.Behaviour:
        generator = torch.Generator().manual_seed(9)
        inputs = torch.randn(7, 6, generator=generator).to(self.dtype)
        labels = torch.randint(0, 3, (7,), generator=generator)
        return culpa.log_likelihood("test", (inputs, labels))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def example_losses(model: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
