"""What the MNIST experiments share: the paper's network, its data, and its training loop.

The paper leaves some of it open; where it does, this is what stands here (§D.2, §E.2, Fig. 3f):
784-128-128-10 with ReLU and torch's default initialisation, pixels in [0, 1], SGD with the "common
values" of Fig. 3f: learning rate .001, momentum .9, weight decay 1e-5.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample

from culpa.behaviour import Behaviour
from culpa.behaviours import log_likelihood
from culpa.experiments.data.digits import Digits, bundled, digits
from culpa.experiments.frame.experiment import Setup
from culpa.experiments.pipeline import SGD, loss, losses
from culpa.problem import Problem

SETTINGS = (
    "A 784-128-128-10 ReLU network on pixels in [0, 1]; SGD with learning rate .001, momentum .9"
    " and weight decay 1e-5."
)
OPEN = (
    "The paper does not say which activation, input scaling, momentum and weight decay these runs"
    " had; here they are ReLU, [0, 1], and the common values of its Fig. 3f."
)


COMMON = SGD(lr=1e-3, momentum=0.9, weight_decay=1e-5)
"""The "common values" of Fig. 3f."""


def network(seed: int, width: int = 128) -> nn.Sequential:
    """The paper's network, its weights drawn from a generator of their own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, 10),
        )  # fmt: skip


def batches(
    images: Tensor, labels: Tensor, size: int, generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """One epoch in random order: images ``[n, 1, 28, 28]`` flattened; the last may be smaller."""
    order = torch.randperm(len(labels), generator=generator)
    flat = images.flatten(1)
    return [(flat[rows], labels[rows]) for rows in order.split(size)]


def turned(images: Tensor, degrees: float) -> Tensor:
    """Rotated about the centre, bilinear, ``[n, 1, 28, 28]``."""
    if degrees == 0.0:
        return images
    angle = torch.tensor(degrees * torch.pi / 180)
    rotation = torch.tensor([[angle.cos(), -angle.sin(), 0.0], [angle.sin(), angle.cos(), 0.0]])
    grid = affine_grid(rotation.expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return grid_sample(images, grid, align_corners=False)


def asked(name: str, images: Tensor, labels: Tensor) -> Behaviour:
    """Log-likelihood of the right digit on these images."""
    return log_likelihood(name, (images.flatten(1), labels))


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right answers."""
    with torch.no_grad():
        return float((model(images.flatten(1)).argmax(1) == labels).double().mean())


def every_seed(setup: Setup, examine: Callable[..., dict[str, Any]]) -> tuple[Digits, list[Any]]:
    """The digits, and what ``examine(options, digits, seed, part)`` found for every seed."""
    data = digits(setup.data, required=setup.scale == "paper")
    setup.work.plan(len(setup.seeds))
    return data, [
        setup.work.part(
            f"seed-{seed}",
            {"seed": seed, "data": data.name},
            partial(examine, setup.options, data, seed),
        )
        for seed in setup.seeds
    ]


def problem() -> tuple[Problem, list[Behaviour]]:
    """For ``culpa verify RUN --problem culpa.experiments.mnist:problem`` on runs of these."""
    data = bundled()
    behaviours = [asked("log-likelihood of scikit-learn's digits", data.images, data.labels)]
    return Problem(network(0), loss, losses), behaviours
