"""Trainings of the tiny Llama that leave checkpoints behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from integrations.llama import collate, llama, trainer

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "logging_strategy": "steps"}
SAVING |= {"logging_steps": 1}


def job(folder: Path, model: nn.Module | None = None, **options: Any) -> Any:
    """6 updates, dropout, accumulation, clipping, a cosine schedule; checkpoints 2, 4 and 6."""
    return trainer(folder, llama(0.2) if model is None else model, **{**SAVING, **options})


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() <= other.keys() and all(torch.equal(v, other[n]) for n, v in one.items())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


class Masking:
    """A collator that draws from the global generator, as masked language modelling does."""

    def __call__(self, rows: list[Any]) -> dict[str, Tensor]:
        batch = collate(rows)
        hidden = torch.rand(batch["input_ids"].shape) < 0.3
        batch["input_ids"] = torch.where(hidden, 1, batch["input_ids"])
        return batch
