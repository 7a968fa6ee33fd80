"""The demo: four stages of training on real handwritten digits, one of them mislabelled.

The images are the 1,797 digits of 8 x 8 pixels that scikit-learn ships (UCI Optical Recognition of
Handwritten Digits). The culprit is planted, so that a reader can judge the verdict.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from culpa.behaviour import Behaviour
from culpa.behaviours import log_likelihood
from culpa.errors import OptionError, UnsupportedError
from culpa.problem import Problem
from culpa.trajectory.record import record
from culpa.trajectory.run import Run, open_run

Batch = tuple[Tensor, Tensor]

BATCH_SIZE = 32
TEST_POINTS = 397
OPTIMIZERS = ("sgd", "adamw")
STAGES = ("clean", "rotated", "mislabelled", "more clean")
DIGIT = 3


def problem() -> tuple[Problem, list[Behaviour]]:
    """The demo's problem and behaviours, for ``--problem culpa.experiments.demo:problem``."""
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
    _, (images, labels) = _digits()
    one = labels == DIGIT
    behaviours = [
        log_likelihood("log-likelihood of clean digits", (images.flatten(1), labels)),
        log_likelihood("log-likelihood of rotated digits", (_rotated(images).flatten(1), labels)),
        log_likelihood(
            f"log-likelihood of the digit {DIGIT}", (images[one].flatten(1), labels[one])
        ),
    ]
    return Problem(model, _loss, _losses), behaviours


def train(
    path: Path, *, seed: int = 0, optimizer: str = "sgd", overwrite: bool = True
) -> tuple[Run, Problem, list[Behaviour]]:
    """Train the four stages in a plain loop, recorded into ``path``."""
    if optimizer not in OPTIMIZERS:
        raise OptionError(
            f"the demo's optimizer is one of {', '.join(OPTIMIZERS)}, got {optimizer!r}."
        )
    torch.manual_seed(seed)
    task, behaviours = problem()
    model = task.model
    stepper = _optimizer(model, optimizer)
    with record(path, task, stepper, overwrite=overwrite) as recorder:
        for name, images, labels, epochs in _pipeline():
            with recorder.stage(name):
                for _ in range(epochs):
                    for batch in recorder.batches(_shuffled(images.flatten(1), labels)):
                        stepper.zero_grad()
                        _loss(model, batch).backward()
                        stepper.step()
    return open_run(path), task, behaviours


def shown(example: Batch) -> tuple[Tensor, str]:
    """A training example as the report shows it: its picture and its label."""
    image, label = example
    return image.view(8, 8), f"labelled {int(label)}"


def _optimizer(model: nn.Module, name: str) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
    return torch.optim.SGD(model.parameters(), lr=2e-2, momentum=0.9, weight_decay=1e-4)


def _pipeline() -> Iterator[tuple[str, Tensor, Tensor, int]]:
    """Name, images, labels and epochs of each stage; 164 updates in all."""
    (images, labels), _ = _digits()
    shifted = (labels + 1) % 10
    parts = [slice(0, 800), slice(800, 1100), slice(1100, 1400), slice(0, 600)]
    kinds = [
        (images, labels, 5),
        (_rotated(images), labels, 1),
        (images, shifted, 1),
        (images, labels, 1),
    ]
    for name, part, (x, y, epochs) in zip(STAGES, parts, kinds, strict=True):
        yield name, x[part], y[part], epochs


def _digits() -> tuple[Batch, Batch]:
    """Training and test digits: images float32 [n, 8, 8] in [0, 1], labels int64 [n]."""
    try:
        from sklearn.datasets import load_digits  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as error:
        raise UnsupportedError(
            "the demo's digits come with scikit-learn, which is not installed. Run: pip install"
            " 'culpa[demo]'."
        ) from error
    data: Any = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32) / 16
    labels = torch.tensor(data.target, dtype=torch.int64)
    cut = len(labels) - TEST_POINTS
    return (images[:cut], labels[:cut]), (images[cut:], labels[cut:])


def _rotated(images: Tensor) -> Tensor:
    """A quarter turn."""
    return torch.rot90(images, 1, (1, 2)).contiguous()


def _shuffled(images: Tensor, labels: Tensor) -> Any:
    data = torch.utils.data.TensorDataset(images, labels)
    return torch.utils.data.DataLoader(data, batch_size=BATCH_SIZE, shuffle=True)


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return _losses(model, batch).mean()


def _losses(model: nn.Module, batch: Batch) -> Tensor:
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels, reduction="none")
