"""Residual networks: ResNet-18 and -34 for pictures of any size, ResNet-20 and -32 for small ones.

He, Zhang, Ren, Sun, Deep Residual Learning for Image Recognition, CVPR 2016: section 4.1 (ImageNet,
shortcuts by 1 x 1 convolutions) and 4.2 (CIFAR-10, parameterless shortcuts). Parameters are named
as torchvision names them, and as the usual CIFAR-10 ones are: ``linear`` instead of ``fc``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from culpa.experiments import weights
from culpa.experiments.data.folder import DataFolder

MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's channels in [0, 1]: what all the pretrained weights expect."""
DEPTHS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
SMALL = {"resnet8": 1, "resnet20": 3, "resnet32": 5}
PLACES = {
    "resnet18": "resnet18/model.safetensors",
    "resnet34": "resnet34/model.safetensors",
    "resnet20": "resnet_cifar10/resnet20.safetensors",
    "resnet32": "resnet_cifar10/resnet32.safetensors",
}
HOW = {
    "resnet18": "timm/resnet18.tv_in1k on the Hugging Face hub has torchvision's ImageNet weights.",
    "resnet34": "timm/resnet34.tv_in1k on the Hugging Face hub has torchvision's ImageNet weights.",
    "resnet20": "Any ResNet-20 for CIFAR-10 with parameterless shortcuts, as safetensors, will do.",
    "resnet32": "Any ResNet-32 for CIFAR-10 with parameterless shortcuts, as safetensors, will do.",
}


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut; ``projected``: by a 1 x 1 convolution where needed."""

    def __init__(self, width: int, wider: int, stride: int, projected: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, wider, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wider)
        self.conv2 = nn.Conv2d(wider, wider, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(wider)
        self.stride, self.missing = stride, wider - width
        changes = stride > 1 or self.missing > 0
        if changes and projected:
            self.downsample = nn.Sequential(
                nn.Conv2d(width, wider, 1, stride, bias=False), nn.BatchNorm2d(wider)
            )
        self.projected = changes and projected

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[B, width, H, W]`` to ``[B, wider, H / stride, W / stride]``."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        if self.projected:
            x = self.downsample(x)
        elif self.stride > 1 or self.missing > 0:
            around = (0, 0, 0, 0, self.missing // 2, self.missing - self.missing // 2)
            x = pad(x[:, :, :: self.stride, :: self.stride], around)
        return torch.relu(x + y)


def _layer(width: int, wider: int, depth: int, stride: int, projected: bool) -> nn.Sequential:
    first = Block(width, wider, stride, projected)
    return nn.Sequential(first, *(Block(wider, wider, 1, projected) for _ in range(depth - 1)))


class ResNet(nn.Module):
    """ResNet-18 or -34. Inputs ``[B, 3, H, W]``, normalised; logits ``[B, classes]``."""

    def __init__(self, depths: tuple[int, ...], classes: int, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = _layer(width, width, depths[0], 1, True)
        self.layer2 = _layer(width, 2 * width, depths[1], 2, True)
        self.layer3 = _layer(2 * width, 4 * width, depths[2], 2, True)
        self.layer4 = _layer(4 * width, 8 * width, depths[3], 2, True)
        self.fc = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        return self.fc(self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3)))


class SmallResNet(nn.Module):
    """ResNet-20 or -32 (6 n + 2). Inputs ``[B, 3, H, W]``, normalised; logits ``[B, classes]``."""

    def __init__(self, n: int, classes: int, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _layer(width, width, n, 1, False)
        self.layer2 = _layer(width, 2 * width, n, 2, False)
        self.layer3 = _layer(2 * width, 4 * width, n, 2, False)
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def resnet(name: str, classes: int, seed: int, width: int | None = None) -> nn.Module:
    """A network by name with random weights from a generator of their own; ``width``: its first."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in SMALL:
            return SmallResNet(SMALL[name], classes, width or 16)
        return ResNet(DEPTHS[name], classes, width or 64)


def pretrained(name: str, classes: int, seed: int, data: DataFolder) -> nn.Module:
    """The same with pretrained weights; the last layer is new where ``classes`` asks for it.

    Raises:
        OptionError: if there are no weights, or of another network.
    """
    model = resnet(name, classes, seed)
    own = 10 if name in SMALL else 1000
    new = () if classes == own else ("linear",) if name in SMALL else ("fc",)
    weights.load(model, weights.find(data, PLACES[name], HOW[name]), new=new)
    return model


def normalised(images: Tensor) -> Tensor:
    """uint8 ``[n, 3, H, W]`` to what the networks take, float32."""
    mean, spread = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, SPREAD))
    return (images.float() / 255 - mean) / spread
