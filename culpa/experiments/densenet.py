"""DenseNet-121, and smaller ones, with parameters named as torchvision names them.

Huang, Liu, van der Maaten, Weinberger, Densely Connected Convolutional Networks, CVPR 2017.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from culpa.experiments import weights
from culpa.experiments.data.folder import DataFolder

PLACE = "densenet121/model.safetensors"
HOW = "timm/densenet121.tv_in1k on the Hugging Face hub has torchvision's ImageNet weights."


class DenseLayer(nn.Module):
    """Adds ``growth`` channels to those it gets."""

    def __init__(self, width: int, growth: int, bottleneck: int = 4) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, bottleneck * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(bottleneck * growth)
        self.conv2 = nn.Conv2d(bottleneck * growth, growth, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, width, H, W]`` to ``[B, width + growth, H, W]``."""
        y = self.conv1(torch.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(torch.relu(self.norm2(y)))], dim=1)


class DenseNet(nn.Module):
    """Inputs ``[B, 3, H, W]``, normalised; logits ``[B, classes]``."""

    def __init__(self, blocks: tuple[int, ...], growth: int, width: int, classes: int) -> None:
        super().__init__()
        parts: list[tuple[str, nn.Module]] = [
            ("conv0", nn.Conv2d(3, width, 7, 2, 3, bias=False)),
            ("norm0", nn.BatchNorm2d(width)),
            ("relu0", nn.ReLU()),
            ("pool0", nn.MaxPool2d(3, 2, 1)),
        ]
        for at, depth in enumerate(blocks, 1):
            layers = [
                (f"denselayer{i + 1}", DenseLayer(width + i * growth, growth)) for i in range(depth)
            ]
            parts.append((f"denseblock{at}", nn.Sequential(OrderedDict(layers))))
            width += depth * growth
            if at < len(blocks):
                parts.append((f"transition{at}", _transition(width)))
                width //= 2
        self.features = nn.Sequential(OrderedDict([*parts, ("norm5", nn.BatchNorm2d(width))]))
        self.classifier: nn.Module = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.classifier(torch.relu(self.features(x)).mean((2, 3)))


def _transition(width: int) -> nn.Sequential:
    parts: list[tuple[str, nn.Module]] = [
        ("norm", nn.BatchNorm2d(width)),
        ("relu", nn.ReLU()),
        ("conv", nn.Conv2d(width, width // 2, 1, bias=False)),
        ("pool", nn.AvgPool2d(2, 2)),
    ]
    return nn.Sequential(OrderedDict(parts))


def densenet121(data: DataFolder) -> DenseNet:
    """With ImageNet's weights.

    Raises:
        OptionError: if there are none.
    """
    model = DenseNet((6, 12, 24, 16), 32, 64, 1000)
    weights.load(model, weights.find(data, PLACE, HOW))
    return model


def small(seed: int) -> DenseNet:
    """Two blocks of two layers, with random weights from a generator of their own: for tests."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DenseNet((2, 2), 4, 8, 10)
