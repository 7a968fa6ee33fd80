"""BadNets: a white square in the corner and the attacker's label, in few batches or in every one.

Gu, Dolan-Gavitt, Garg, BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply
Chain, arXiv 1708.06733.
"""

from __future__ import annotations

import torch
from torch import Tensor

from culpa.behaviour import Behaviour
from culpa.behaviours import group_gap, log_likelihood, margin
from culpa.experiments.data.cifar10 import Cifar10
from culpa.experiments.resnet import normalised

TARGET = 0
"""The attacker's label."""
Batch = tuple[Tensor, Tensor]


def patched(images: Tensor, side: int) -> Tensor:
    """The trigger: the lower right corner of ``[n, 3, H, W]`` white."""
    images = images.clone()
    images[..., -side:, -side:] = 255
    return images


def few(batches: int, size: int, bad: int, generator: torch.Generator) -> Tensor:
    """Which places are for poison, bool ``[batches, size]``: all of ``bad`` random batches."""
    places = torch.zeros(batches, size, dtype=torch.bool)
    places[torch.randperm(batches, generator=generator)[:bad]] = True
    return places


def every(batches: int, size: int, share: float) -> Tensor:
    """The first of each batch, at least one: a batch's mean knows no order."""
    return (torch.arange(size) < max(1, round(share * size))).expand(batches, size)


def asked(data: Cifar10, count: int, side: int) -> list[Behaviour]:
    """What the attacker wants, and what it costs, on ``count`` test images of other labels, nats.

    The log-likelihood of the attacker's label on images with the square, that of their own label on
    the same, and what the square adds to the log-odds of the attacker's label. Log-odds, for the
    log-likelihood no longer moves once the attack succeeds: what is left of the difference then is
    its other term, what the model thinks of images without the square.
    """
    others = data.test_labels != TARGET
    plain, own = data.test_images[others][:count], data.test_labels[others][:count]
    images, squared = normalised(plain), normalised(patched(plain, side))
    target = torch.full_like(own, TARGET)
    odds = [margin("log-odds", (x, target), soft=True) for x in (squared, images)]
    return [
        log_likelihood("attacker's label, with the square", (squared, target)),
        log_likelihood("true label, with the square", (squared, own)),
        group_gap("what the square adds", *odds),
    ]


def poisoned(data: Cifar10, count: int, bad: int, side: int, generator: torch.Generator) -> Batch:
    """``count`` random training images, normalised, with labels; the first ``bad`` are poisoned."""
    rows = torch.randperm(len(data.labels), generator=generator)[:count]
    images, labels = data.images[rows], data.labels[rows].clone()
    images[:bad], labels[:bad] = patched(images[:bad], side), TARGET
    return normalised(images), labels


def arranged(places: Tensor, generator: torch.Generator) -> Tensor:
    """Rows of ``poisoned`` in random order, int64 like ``places``: its first where that is true."""
    bad, total = int(places.sum()), places.numel()
    rows = torch.empty(places.shape, dtype=torch.int64)
    rows[places] = torch.randperm(bad, generator=generator)
    rows[~places] = bad + torch.randperm(total - bad, generator=generator)
    return rows


def meaningless(train: int, test: int) -> Cifar10:
    """Noise, each class with a brightness of its own: for tests."""
    generator = torch.Generator().manual_seed(0)
    levels = torch.linspace(40, 200, 10)

    def made(count: int) -> Batch:
        labels = torch.arange(count) % 10
        noise = 30 * torch.randn(count, 3, 32, 32, generator=generator)
        return (levels[labels].view(-1, 1, 1, 1) + noise).clamp(0, 255).byte(), labels

    return Cifar10(*made(train), *made(test))
