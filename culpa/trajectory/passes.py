"""The forward and backward passes of a recorded update, as its loop made them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from culpa.problem import Problem
from culpa.trajectory import rng
from culpa.trajectory.blame import blamed_on_loss
from culpa.trajectory.ranks.execute import Part
from culpa.trajectory.ranks.precision import computing, precision_of
from culpa.trajectory.rng import RandomState
from culpa.trajectory.schema import StepRecord


def backward(
    problem: Problem, record: StepRecord, part: Part, scaler: GradScaler | None, keep: bool
) -> tuple[float, list[RandomState]]:
    """Accumulate gradients; the loss, and the generators before each forward that draws."""
    total, used = 0.0, list[RandomState]()
    for at, (batch, random) in enumerate(zip(part.batches, part.randoms, strict=True)):
        if random is not None:
            rng.restore(random)
        if at < record.discarded:
            with torch.no_grad(), blamed_on_loss(record.index):
                problem.loss(problem.model, batch)
            continue
        if keep and record.drew_randomness:
            used.append(rng.capture())
        precision = precision_of(record.optimizer.reduction)
        with blamed_on_loss(record.index), computing(problem.model, precision):
            share = part.weights, at - record.discarded, part.count
            loss = _weighted(problem.evaluate(batch), *share)
            (loss if scaler is None else scaler.scale(loss)).backward()
        total += float(loss.detach())
    return total, used


def _weighted(loss: Tensor, weights: Sequence[float] | None, at: int, count: int) -> Tensor:
    """The micro-batch's share, computed as loops do: divided by n, or multiplied by its weight."""
    if weights is not None:
        return loss * weights[at]
    return loss / count if count > 1 else loss
