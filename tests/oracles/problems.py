"""Small problems with known properties, each a ``Plan`` for ``retrain``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import Optimizer

from oracles.retrain import Plan

STAGES = (("first", 0, 5), ("second", 5, 9), ("third", 9, 12))


def seeded(seed: int, build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """The same weights at every call, without touching the global generator."""

    def make() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build()

    return make


def half_squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Half the squared error of every example, ``[B]``."""
    inputs, targets = batch
    return 0.5 * (model(inputs) - targets).square().sum(1)


def half_square(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Its mean: exactly quadratic in the parameters of a linear model."""
    return half_squares(model, batch).mean()


def cross_entropies(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy of every example, ``[B]``."""
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs), targets, reduction="none")


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Its mean."""
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs), targets)


def log_likelihoods(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Log-likelihood of every test point, ``[n]``."""
    return -cross_entropies(model, batch)


def parameter_sums(model: nn.Module, _: object) -> Tensor:
    """The sum of every parameter tensor: a behaviour that is linear in the parameters."""
    return torch.stack([p.sum() for _, p in model.named_parameters()])


def first_output(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The first output for every input: linear in the parameters of a linear model."""
    return model(batch[0])[:, 0]


def affine(
    optimizers: Mapping[int, Callable[[nn.Module], Optimizer]],
    rates: Sequence[Sequence[float]],
    stages: Sequence[tuple[str, int, int]] = STAGES,
    seed: int = 0,
) -> Plan:
    """Least squares on a linear model, float64: SGD's updates are affine maps of its state."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batches = [(normal(6, 4), normal(6, 3)) for _ in rates]
    return Plan(
        model=seeded(seed, lambda: nn.Linear(4, 3).double()),
        loss=half_square,
        optimizers=optimizers,
        batches=batches,
        rates=rates,
        stages=stages,
        example_losses=half_squares,
    )


def smooth(
    optimizers: Mapping[int, Callable[[nn.Module], Optimizer]],
    rates: Sequence[Sequence[float]],
    stages: Sequence[tuple[str, int, int]] = STAGES,
    seed: int = 0,
    batch_size: int = 8,
) -> Plan:
    """A tiny GELU classifier, float64, without dead inputs."""
    generator = torch.Generator().manual_seed(seed + 100)

    def batch() -> tuple[Tensor, Tensor]:
        inputs = torch.randn(batch_size, 5, generator=generator, dtype=torch.float64)
        return inputs, torch.randint(0, 3, (batch_size,), generator=generator)

    return Plan(
        model=seeded(
            seed, lambda: nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3)).double()
        ),
        loss=cross_entropy,
        optimizers=optimizers,
        batches=[batch() for _ in rates],
        rates=rates,
        stages=stages,
        example_losses=cross_entropies,
    )


def held_out(seed: int = 0, count: int = 6) -> tuple[Tensor, Tensor]:
    """Test points for ``smooth``."""
    generator = torch.Generator().manual_seed(seed + 1000)
    inputs = torch.randn(count, 5, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (count,), generator=generator)


@cache
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 handwritten digits, shuffled once, standardised, ``[N, 8, 8]``."""
    data: Any = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order]
    return (images - images.mean()) / images.std(), torch.tensor(data.target, dtype=torch.int64)[
        order
    ]


def unseen_digits(count: int = 300, turns: int = 0) -> tuple[Tensor, Tensor]:
    """The last images, turned by quarter turns; never trained on."""
    images, targets = digits()
    return torch.rot90(images[-count:], turns, (1, 2)).flatten(1), targets[-count:]


def gelu_mlp(hidden: int = 64, seed: int = 0) -> Callable[[], nn.Module]:
    """64 -> hidden -> hidden -> 10 with GELU and torch's default initialisation."""
    return seeded(
        seed,
        lambda: nn.Sequential(
            nn.Linear(64, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, 10),
        ),
    )


def turned_digits(
    optimizer: Callable[[nn.Module], Optimizer],
    rate: float,
    lengths: Sequence[int] = (32, 16, 16),
    batch_size: int = 32,
    hidden: int = 64,
    turns: Sequence[int] = (0, 1, 2),
) -> Plan:
    """Three stages on digits turned by 0, 90 and 180 degrees (the paper's Section 5.2, rotated)."""
    images, targets = digits()
    batches: list[tuple[Tensor, Tensor]] = []
    stages: list[tuple[str, int, int]] = []
    for number, length in enumerate(lengths):
        start = len(batches)
        for k in range(start, start + length):
            rows = torch.arange(k * batch_size, (k + 1) * batch_size) % 1400
            turned = torch.rot90(images[rows], turns[number], (1, 2)).flatten(1)
            batches.append((turned, targets[rows]))
        stages.append((f"stage {number + 1}", start, start + length))
    return Plan(
        model=gelu_mlp(hidden),
        loss=cross_entropy,
        optimizers={0: optimizer},
        batches=batches,
        rates=[(rate,)] * len(batches),
        stages=stages,
        example_losses=cross_entropies,
    )
