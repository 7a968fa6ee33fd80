"""Plain FSDP2 training, recorded or not: nothing here knows how culpa does it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import culpa
from tests.distributed.training import STAGES, Case, loss


class Sharding(Case):
    """A ``Case`` whose model is sharded: the last block by itself, then the whole.

    Args:
        sync_each: reduce after every micro-batch, as FSDP2 does unless told otherwise.
        aside: between updates, evaluate the sharded model and gather its parameters.
        options: of ``fully_shard``.
    """

    def __init__(
        self,
        *,
        sync_each: bool = False,
        aside: bool = False,
        options: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        self.sync_each, self.aside, self.options = sync_each, aside, options or {}

    def model(self) -> nn.Module:
        """No size is a multiple of two, three or four ranks, and the last bias is shorter."""
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Linear(6, 13, bias=not self.batch_norm),
            nn.BatchNorm1d(13) if self.batch_norm else nn.Identity(),
            nn.GELU(),
            nn.Dropout(self.dropout),
            nn.Sequential(nn.Linear(13, 7), nn.LayerNorm(7), nn.GELU()),
            nn.Linear(7, 3),
        ).to(self.dtype)

    def sharded(self, model: Any = None) -> nn.Module:
        model = model or self.model()
        fully_shard(model[4], **self.options)
        return fully_shard(model, **self.options)

    def train(
        self, rank: int, path: Path | None = None, skip: Collection[int] = (), **options: Any
    ) -> dict[str, Tensor]:
        """See ``Case``; whole tensors."""
        model: Any = self.sharded()
        optimizer = self.optimizer(model.parameters())
        torch.manual_seed(50 + rank)
        recording = (
            nullcontext()
            if path is None
            else culpa.record(
                path, self.problem(model), optimizer, clip_grad_norm=self.clip, **options
            )
        )
        with recording as recorder:
            for number, name in enumerate(STAGES):
                with nullcontext() if recorder is None else recorder.stage(name):
                    loader = self.batches(rank, number)
                    drawn = loader if recorder is None else recorder.batches(loader)
                    for i, batch in enumerate(drawn):
                        if number * self.updates + i // self.accumulate not in skip:
                            self._part(model, optimizer, batch, i)
                        elif self.dropout:
                            with torch.no_grad():
                                model(batch[0])  # later updates draw the masks that they drew
                            model.reshard()
        return whole(model)

    def _part(self, model: Any, optimizer: Any, batch: Any, i: int) -> None:
        last = (i + 1) % self.accumulate == 0
        model.set_requires_gradient_sync(last or self.sync_each)
        value = loss(model, batch)
        (value / self.accumulate if self.accumulate > 1 else value).backward()
        if last:
            if self.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), self.clip)
            optimizer.step()
            optimizer.zero_grad()
            if self.aside:
                self._look(model, batch)

    def _look(self, model: Any, batch: Any) -> None:
        model.eval()
        with torch.no_grad():
            model(batch[0])
        model.train()
        model.reshard()
        whole(model)


def whole(model: nn.Module) -> dict[str, Tensor]:
    """What ``full_state_dict`` of torch.distributed.checkpoint gives: whole copies by name."""
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()
        for name, value in model.state_dict().items()
    }


Make = Callable[[Any], torch.optim.Optimizer]
MOMENTUM: Make = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01)
