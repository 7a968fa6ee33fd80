"""Behaviours of classifiers. Batches are ``(inputs, targets)``, targets int64 ``[n]``.

``model(inputs)`` (or ``model(**inputs)`` for a mapping) gives logits ``[n, classes]``, or an object
that has them as ``.logits``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from culpa.behaviour import Behaviour
from culpa.behaviours.outputs import classify
from culpa.errors import OptionError

Batch = tuple[Any, Tensor]


def log_likelihood(name: str, batch: Batch) -> Behaviour:
    """Log-likelihood of the right class, in nats: ``log softmax(model(inputs))[target]``.

    Args:
        name: how tables and reports call it.
        batch: ``(inputs, targets)``, targets int64 ``[n]``; ``model(inputs)`` gives logits
            ``[n, classes]``.
    """
    return Behaviour(name, _log_likelihood, batch, unit="nats")


def _log_likelihood(model: nn.Module, batch: Batch) -> Tensor:
    logits, targets = classify(model, batch, "log_likelihood")
    return torch.log_softmax(logits, dim=-1).gather(1, targets.unsqueeze(1)).squeeze(1)


def margin(name: str, batch: Batch, *, soft: bool = False) -> Behaviour:
    """By how much the right class's logit exceeds the best other one; positive: classified right.

    Args:
        name: how tables and reports call it.
        batch: ``(inputs, targets)``.
        soft: the log-odds of the right class instead, ``log p / (1 - p)``: the logit minus the
            log-sum-exp of the others. Smooth, in nats.
    """
    return Behaviour(name, partial(_margin, soft=soft), batch, unit="nats" if soft else "logits")


def _margin(model: nn.Module, batch: Batch, soft: bool) -> Tensor:
    logits, targets = classify(model, batch, "margin")
    right = targets.unsqueeze(1)
    others = logits.scatter(1, right, -torch.inf)
    best = others.logsumexp(1) if soft else others.amax(1)
    return logits.gather(1, right).squeeze(1) - best


def accuracy(name: str, batch: Batch) -> Behaviour:
    """1 where the class with the largest logit is the right one, else 0.

    Not differentiable: ``culpa.replay`` and ``StageEmbeddings.effect`` take it, the first-order
    scores refuse it (use ``margin`` or ``log_likelihood`` for those).
    """
    return Behaviour(name, _accuracy, batch, unit="share")


def _accuracy(model: nn.Module, batch: Batch) -> Tensor:
    logits, targets = classify(model, batch, "accuracy")
    return (logits.argmax(1) == targets).to(logits.dtype)


def overconfidence(name: str, batch: Batch) -> Behaviour:
    """Confidence minus correctness: the largest probability, minus 1 where it is right.

    The mean is by how much the model is surer than it is right (negative: less sure). Its
    derivative is that of the confidence; correctness moves in jumps, which it does not see.
    """
    return Behaviour(name, _overconfidence, batch, unit="probability")


def _overconfidence(model: nn.Module, batch: Batch) -> Tensor:
    logits, targets = classify(model, batch, "overconfidence")
    confidence, chosen = torch.softmax(logits, dim=-1).max(1)
    return confidence - (chosen == targets).to(logits.dtype)


def calibration_error(name: str, batch: Batch, *, bins: int = 15) -> Behaviour:
    """Expected calibration error: the mean over test points is the ECE over equal-width bins.

    A test point's number is its confidence minus correctness, signed as its bin as a whole: within
    a bin they add up to the bin's ``|confidence - accuracy|``. Higher is worse. Differentiable as
    ``overconfidence`` is, with the bins held fixed.

    Source: Guo et al., On Calibration of Modern Neural Networks, 2017, equation 3.
    """
    if bins < 1:
        raise OptionError(f"calibration_error needs at least one bin, got {bins}.")
    return Behaviour(name, partial(_calibration_error, bins=bins), batch, unit="probability")


def _calibration_error(model: nn.Module, batch: Batch, bins: int) -> Tensor:
    logits, targets = classify(model, batch, "calibration_error")
    confidence, chosen = torch.softmax(logits, dim=-1).max(1)
    surplus = confidence - (chosen == targets).to(logits.dtype)
    # Bins are (i/n, (i+1)/n], as in the paper.
    at = (confidence.detach() * bins).ceil().long().sub(1).clamp(0, bins - 1)
    total = torch.zeros(bins, dtype=surplus.dtype, device=surplus.device)
    return surplus * total.index_add(0, at, surplus.detach()).sign()[at]
