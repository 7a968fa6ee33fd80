"""The training loops that recording.py and replay.py measure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from culpa.experiments import demo

Batch = tuple[Tensor, Tensor]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """What all of these loops minimise."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@dataclass(frozen=True)
class Case:
    """A training loop: ``stages`` yields a name and the batches of each stage."""

    name: str
    model: Callable[[], nn.Module]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    stages: Callable[[], Iterator[tuple[str, Iterable[Batch]]]]


def mlp() -> nn.Module:
    """784-128-128-10."""
    return nn.Sequential(
        nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(into, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        same = into == out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(into, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """f(x) + x."""
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet8() -> nn.Module:
    """Three blocks of 16, 32 and 64 channels on 32 x 32 images."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Residual(16, 16, 1),
        Residual(16, 32, 2),
        Residual(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


class Adapted(nn.Module):
    """A frozen linear map and one of rank 8 beside it, which trains."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.frozen = nn.Linear(into, out)
        self.frozen.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(8, into) / into**0.5)
        self.up = nn.Parameter(torch.zeros(out, 8))

    def forward(self, x: Tensor) -> Tensor:
        """W x + b + U D x."""
        return self.frozen(x) + x @ self.down.T @ self.up.T


class Block(nn.Module):
    """Attention of four heads and an MLP, with adapters at all of their maps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2)).requires_grad_(False)
        self.into, self.out = Adapted(width, 3 * width), Adapted(width, width)
        self.mlp = nn.Sequential(Adapted(width, 4 * width), nn.GELU(), Adapted(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, width] -> the same."""
        parts = self.into(self.norms[0](x)).chunk(3, -1)
        heads = [part.unflatten(-1, (4, -1)).transpose(1, 2) for part in parts]
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norms[1](x))


class LoRA(nn.Module):
    """Four blocks of width 192 that tell ten classes apart by the last token, adapters alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 192).requires_grad_(False)
        self.blocks = nn.Sequential(*(Block(192) for _ in range(4)))
        self.head = nn.Linear(192, 10).requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, length] -> [batch, 10]."""
        return self.head(self.blocks(self.embedding(tokens))[:, -1])


def texts(examples: int, size: int, count: int) -> Iterator[tuple[str, Iterable[Batch]]]:
    """Shuffled epochs over made-up sequences of 64 tokens."""
    data = torch.randint(0, 1000, (examples, 64)), torch.randint(0, 10, (examples,))

    def batches() -> Iterator[Batch]:
        for _ in range(count):
            for rows in torch.randperm(examples).split(size):
                yield data[0][rows], data[1][rows]

    yield "fine-tuning", batches()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Of what requires a gradient."""
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)


def epochs(
    shape: tuple[int, ...], examples: int, size: int, count: int
) -> Iterator[tuple[str, Iterable[Batch]]]:
    """Shuffled epochs over made-up images, one stage."""
    data = torch.randn(examples, *shape), torch.randint(0, 10, (examples,))

    def batches() -> Iterator[Batch]:
        for _ in range(count):
            for rows in torch.randperm(examples).split(size):
                yield data[0][rows], data[1][rows]

    yield "training", batches()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """With momentum."""
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def demo_stages() -> Iterator[tuple[str, Iterable[Batch]]]:
    """The four stages of ``culpa demo``, through its loaders."""
    for name, images, labels, count in demo._pipeline():  # pyright: ignore[reportPrivateUsage]
        yield name, _repeated(images, labels, count)


def _repeated(images: Tensor, labels: Tensor, count: int) -> Iterator[Batch]:
    for _ in range(count):
        yield from demo._shuffled(images.flatten(1), labels)  # pyright: ignore[reportPrivateUsage]


CASES = (
    Case("MLP 784-128-128-10, batch 100", mlp, sgd, lambda: epochs((784,), 10_000, 100, 40)),
    Case("ResNet-8, 32 x 32, batch 64", resnet8, sgd, lambda: epochs((3, 32, 32), 640, 64, 20)),
    Case("LoRA of rank 8, AdamW, batch 16", LoRA, adamw, lambda: texts(160, 16, 12)),
    Case("the demo's loop", lambda: demo.problem()[0].model, sgd, demo_stages),
)
