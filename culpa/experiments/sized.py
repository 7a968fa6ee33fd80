"""Tasks of several sizes for ``cost`` and ``scaling``: hair on faces, toxicity of comments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import torch
from torch import nn

from culpa.behaviour import Behaviour
from culpa.behaviours import log_likelihood
from culpa.experiments.classifier import Language, classifier
from culpa.experiments.data.celeba import celeba
from culpa.experiments.data.civilcomments import civilcomments
from culpa.experiments.data.folder import DataFolder
from culpa.experiments.frame.experiment import Setup
from culpa.experiments.frame.work import Part
from culpa.experiments.pipeline import Batch, Job, loss, losses
from culpa.experiments.resnet import PLACES, normalised, pretrained, resnet
from culpa.problem import Problem

BLOND = "Blond_Hair"
NARROW = "resnet8"
"""With random weights, four channels wide: for tests."""


@dataclass(frozen=True)
class Sizes:
    """Of batches, of images in pixels, of comments in tokens; ``test`` examples."""

    image_batch: int
    text_batch: int
    size: int
    tokens: int
    test: int = 60


class Grid(msgspec.Struct, frozen=True):
    """Options of an experiment over sizes: ``models``, of ``task``, at ``counts`` of examples."""

    seeds: int = 1
    models: tuple[str, ...] = ("resnet20", "resnet32", "stories260K:2", "stories260K")
    counts: tuple[int, ...] = (64, 128, 256)
    image_batch: int = 8
    text_batch: int = 16
    size: int = 32
    tokens: int = 32
    test: int = 60

    @property
    def sizes(self) -> Sizes:
        """Of batches and inputs."""
        return Sizes(self.image_batch, self.text_batch, self.size, self.tokens, self.test)

    @property
    def columns(self) -> list[str]:
        """Of tables: the paper's number of examples and ours."""
        theirs = ("2K", "4K", "8K")
        return [f"{t} / {c:,}" for t, c in zip(theirs, self.counts, strict=True)]


def parts(
    setup: Setup, examine: Callable[[Any, DataFolder, str, int, int, Part], Any]
) -> dict[tuple[str, int], list[Any]]:
    """What ``examine(options, data, model, count, seed, part)`` found, a list over seeds.

    Raises:
        OptionError: at the paper's scale without the paper's data.
    """
    options: Grid = setup.options
    if setup.scale == "paper":
        celeba(setup.data, required=True)
        civilcomments(setup.data, required=True)
    grid = [(name, count) for name in options.models for count in options.counts]
    setup.work.plan(len(grid) * len(setup.seeds))
    return {
        (name, count): [
            setup.work.part(
                f"{name.replace(':', '-').lower()}-{count}-{seed}",
                {"model": name, "count": count, "seed": seed},
                partial(examine, options, setup.data, name, count, seed),
            )
            for seed in setup.seeds
        ]
        for name, count in grid
    }


def task(
    sizes: Sizes, data: DataFolder, name: str, count: int, seed: int, stages: int = 1
) -> tuple[nn.Module, Job, Behaviour]:
    """A model, ``count`` training examples in batches, and the log-likelihood on test examples.

    Args:
        sizes: of batches and inputs.
        data: where CelebA and comments are.
        name: a network of ``resnet.py``, or a language model; ``model:2`` is its first two layers.
        count: training examples.
        seed: of their choice, the model's new layers included.
        stages: whole batches are cut so that each of so many stages has as many.
    """
    generator = torch.Generator().manual_seed(seed)
    if name in PLACES or name == NARROW:
        model, train, test = _faces(sizes, data, name, count, seed, generator)
        batch = sizes.image_batch
    else:
        model, train, test = _comments(sizes, data, name, count, seed, generator)
        batch = sizes.text_batch
    rows = torch.arange(count).split(batch)
    batches = [_cut(train, some) for some in rows]
    whole = len(batches) // stages * stages
    return model, Job("training", batches[:whole]), log_likelihood("log-likelihood", test)


def problem_of(model: nn.Module) -> Problem:
    """Cross-entropy, as ``pipeline.train`` has it."""
    return Problem(model, loss, losses)


def _cut(batch: Batch, rows: torch.Tensor) -> Batch:
    inputs, labels = batch
    if isinstance(inputs, dict):
        return {n: t[rows] for n, t in inputs.items()}, labels[rows]
    return inputs[rows], labels[rows]


def _faces(
    sizes: Sizes, data: DataFolder, name: str, count: int, seed: int, generator: torch.Generator
) -> tuple[nn.Module, Batch, Batch]:
    faces = celeba(data)
    rows = torch.randperm(len(faces.train), generator=generator)[: count + sizes.test]
    images = normalised(faces.images(rows.tolist(), sizes.size))
    labels = faces.has(BLOND)[rows].long()
    model = resnet(name, 2, seed, 4) if name == NARROW else pretrained(name, 2, seed, data)
    return model, (images[:count], labels[:count]), (images[count:], labels[count:])


def _comments(
    sizes: Sizes, data: DataFolder, name: str, count: int, seed: int, generator: torch.Generator
) -> tuple[nn.Module, Batch, Batch]:
    comments = civilcomments(data)
    rows = torch.randperm(len(comments.texts), generator=generator)[: count + sizes.test]
    base, _, layers = name.partition(":")
    model, words = classifier(base, seed, data, layers=int(layers) if layers else None)
    encoded, labels = _encoded(comments.texts, rows, words, sizes), comments.toxic[rows].long()
    return (
        model,
        ({n: t[:count] for n, t in encoded.items()}, labels[:count]),
        ({n: t[count:] for n, t in encoded.items()}, labels[count:]),
    )


def _encoded(
    texts: tuple[str, ...], rows: torch.Tensor, words: Language, sizes: Sizes
) -> dict[str, torch.Tensor]:
    return words([texts[r] for r in rows.tolist()], sizes.tokens)
