"""Tasks of several sizes for ``cost`` and ``scaling``: hair on faces, toxicity of comments."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from culpa.behaviour import Behaviour
from culpa.behaviours import log_likelihood
from culpa.experiments.classifier import Language, classifier
from culpa.experiments.data.celeba import celeba
from culpa.experiments.data.civilcomments import civilcomments
from culpa.experiments.data.folder import DataFolder
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
