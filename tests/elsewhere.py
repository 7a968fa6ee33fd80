"""A small training that happens on whichever device it is told to (devices.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import culpa


@dataclass(frozen=True)
class Training:
    """A small training in three stages; the same wherever it happens."""

    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    normalises: bool = False
    drops: bool = False
    frozen: bool = False
    micro_batches: int = 1
    clips: bool = False
    updates: int = 3

    def model(self) -> nn.Module:
        """With the weights it begins with."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            hidden = nn.BatchNorm1d(6) if self.normalises else nn.Identity()
            dropout = nn.Dropout(0.3) if self.drops else nn.Identity()
            made = nn.Sequential(nn.Linear(5, 6), hidden, nn.Tanh(), dropout, nn.Linear(6, 3))
        made[0].requires_grad_(not self.frozen)
        return made

    def recorded(self, path: Path, place: Callable[[Any], Any], **options: Any) -> culpa.Run:
        """The run, its model and batches where ``place`` puts them."""
        model, generator = place(self.model()), torch.Generator().manual_seed(1)
        optimizer = self.optimizer([p for p in model.parameters() if p.requires_grad])
        torch.manual_seed(2)
        options |= {"clip_grad_norm": 0.3} if self.clips else {}
        with culpa.record(path, problem_of(model), optimizer, **options) as recorder:
            for stage in ("one", "two", "three"):
                with recorder.stage(stage):
                    for _ in range(self.updates):
                        batches = [place(batch(generator)) for _ in range(self.micro_batches)]
                        with recorder.step(*batches):
                            optimizer.zero_grad()
                            for one in batches:
                                (loss(model, one) / self.micro_batches).backward()
                            if self.clips:
                                nn.utils.clip_grad_norm_(model.parameters(), 0.3)
                            optimizer.step()
        return culpa.open_run(path)


def batch(generator: torch.Generator, rows: int = 6) -> tuple[Tensor, Tensor]:
    """Inputs and classes, on the CPU."""
    inputs = torch.randn(rows, 5, generator=generator)
    return inputs, torch.randint(0, 3, (rows,), generator=generator)


def loss(model: nn.Module, one: tuple[Tensor, Tensor]) -> Tensor:
    """Of a micro-batch."""
    return functional.cross_entropy(model(one[0]), one[1])


def losses(model: nn.Module, one: tuple[Tensor, Tensor]) -> Tensor:
    """Of its examples."""
    return functional.cross_entropy(model(one[0]), one[1], reduction="none")


def problem_of(model: nn.Module) -> culpa.Problem:
    """What the training minimises."""
    return culpa.Problem(model, loss, losses)
