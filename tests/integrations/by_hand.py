"""What ``transformers.Trainer`` does, as a plain loop: a truth that shares nothing with it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Micro = list[dict[str, Tensor]]


@dataclass
class Spied:
    """The inputs of every micro-batch by update, and each update's learning rate and loss scale."""

    updates: list[Micro] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)


def spied(job: Any, **options: Any) -> Spied:
    """Trains, and keeps what the updates were made of; those skipped for an overflow left out."""
    found = Spied()
    step = job.training_step

    def keep(model: nn.Module, inputs: dict[str, Tensor], items: Any = None) -> Tensor:
        scaler = job.accelerator.scaler
        scale = 1.0 if scaler is None else scaler.get_scale()
        begins = not found.updates or len(found.updates[-1]) == job.args.gradient_accumulation_steps
        if begins:
            if found.scales and scale < found.scales[-1]:
                _forget_last(found)
            found.updates.append([])
            found.rates.append(job.lr_scheduler.get_last_lr()[0])
            found.scales.append(scale)
        found.updates[-1].append({k: v.clone() for k, v in inputs.items()})
        return step(model, inputs, items)

    job.training_step = keep
    job.train(**options)
    scaler = job.accelerator.scaler
    if scaler is not None and scaler.get_scale() < found.scales[-1]:
        _forget_last(found)
    return found


def _forget_last(found: Spied) -> None:
    for kept in (found.updates, found.rates, found.scales):
        kept.pop()


def retrained(
    model: nn.Module,
    seen: Spied,
    without: Sequence[int] = (),
    *,
    autocast: torch.dtype | None = None,
    optimizer_state: Any = None,
) -> dict[str, Tensor]:
    """Token-weighted loss, clipping at 0.5, AdamW with decay 0.1 of what is no norm and no bias."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    decayed = [p for n, p in trained.items() if "norm" not in n and "bias" not in n]
    others = [p for n, p in trained.items() if "norm" in n or "bias" in n]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    if optimizer_state is not None:
        optimizer.load_state_dict(optimizer_state)
    model.train()
    for at, (micro, rate, scale) in enumerate(
        zip(seen.updates, seen.rates, seen.scales, strict=True)
    ):
        if at in without:
            continue
        tokens = sum(int((m["labels"][:, 1:] != -100).sum()) for m in micro)
        for inputs in micro:
            with torch.autocast("cpu", autocast) if autocast is not None else nullcontext():
                found = model(
                    input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
                )
                flat = nn.functional.cross_entropy(
                    found.logits[:, :-1].float().flatten(0, 1),
                    inputs["labels"][:, 1:].flatten(),
                    ignore_index=-100,
                    reduction="sum",
                )
            (flat / tokens * scale).backward()
        for parameter in trained.values():
            assert parameter.grad is not None
            parameter.grad /= scale
        torch.nn.utils.clip_grad_norm_(trained.values(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return {n: p.detach().clone() for n, p in trained.items()}
