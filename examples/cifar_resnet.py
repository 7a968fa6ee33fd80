"""A CIFAR-10 ResNet-20 with BatchNorm, fine-tuned in three stages with augmentation.

The second stage has the labels of cats and dogs swapped. The loop is a plain one; the truth is the
same loop without a stage. Needs ``cifar10.npz`` (packed JPEGs) in the folder ``CULPA_DATA``,
``resnet_cifar10/resnet20.safetensors`` (He et al.'s sizes, option A) in ``CULPA_MODELS``, Pillow.

    python examples/cifar_resnet.py [--updates 8] [--out docs/examples/cifar_resnet.md]
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

import culpa

Batch = tuple[Tensor, Tensor]
CAT, DOG = 3, 5
STAGES = ("clean", "cats and dogs swapped", "clean again")
ROWS, RATE = 32, 0.003


class Block(nn.Module):
    """Two convolutions, and a shortcut without parameters."""

    def __init__(self, width: int, wider: int) -> None:
        super().__init__()
        stride = 1 if width == wider else 2
        self.conv1 = nn.Conv2d(width, wider, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wider)
        self.conv2 = nn.Conv2d(wider, wider, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(wider)

    def forward(self, x: Tensor) -> Tensor:
        """[n, width, h, w] -> [n, wider, h, w], or half of h and w."""
        found = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        missing = found.shape[1] - x.shape[1]
        if missing:
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, missing // 2, missing // 2))
        return functional.relu(found + x)


class ResNet20(nn.Module):
    """He et al. 2015, section 4.2, n = 3."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16), Block(16, 16), Block(16, 16))
        self.layer2 = nn.Sequential(Block(16, 32), Block(32, 32), Block(32, 32))
        self.layer3 = nn.Sequential(Block(32, 64), Block(64, 64), Block(64, 64))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[n, 3, 32, 32] -> logits [n, 10]."""
        x = functional.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def pretrained() -> nn.Module:
    """With the weights."""
    model = ResNet20()
    weights = load_file(Path(os.environ["CULPA_MODELS"]) / "resnet_cifar10/resnet20.safetensors")
    model.load_state_dict(weights, strict=False)  # the file has no counts of batches
    return model.train()


def images(part: str, count: int) -> Batch:
    """The first ``count`` images of a part, normalised as the weights expect."""
    with np.load(Path(os.environ["CULPA_DATA"]) / "cifar10.npz") as data:
        offsets, packed = data[f"offsets_{part}"], data[f"jpeg_{part}"]
        files = [packed[offsets[i] : offsets[i + 1]].tobytes() for i in range(count)]
        labels = torch.from_numpy(data[f"y_{part}"][:count].astype(np.int64))
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files])
    mean, spread = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    scaled = (torch.from_numpy(pixels).float() / 255 - mean) / spread
    return scaled.permute(0, 3, 1, 2).contiguous(), labels


def augmented(inputs: Tensor, draw: torch.Generator) -> Tensor:
    """Each image shifted by up to 4 pixels, and mirrored or not."""
    padded = functional.pad(inputs, (4, 4, 4, 4))
    rows: list[Tensor] = []
    for image in padded:
        down, right, mirror = torch.randint(9, (3,), generator=draw).tolist()
        cut = image[:, down : down + 32, right : right + 32]
        rows.append(cut.flip(2) if mirror % 2 else cut)
    return torch.stack(rows)


def batches_of(stage: int, data: Batch, updates: int) -> list[Batch]:
    """The stage's batches, the same every time."""
    draw = torch.Generator().manual_seed(stage)
    found: list[Batch] = []
    for _ in range(updates):
        chosen = torch.randint(len(data[1]), (ROWS,), generator=draw)
        labels = data[1][chosen]
        if STAGES[stage] == "cats and dogs swapped":
            labels = torch.where(labels == CAT, DOG, torch.where(labels == DOG, CAT, labels))
        found.append((augmented(data[0][chosen], draw), labels))
    return found


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """What the loop minimises."""
    return functional.cross_entropy(model(batch[0]), batch[1])


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """One for all stages."""
    return torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=1e-4)


def train(stages: list[list[Batch]], without: Collection[int] = ()) -> nn.Module:
    """Without culpa, and without some stages."""
    model = pretrained()
    optimizer = optimizer_of(model)
    for number, batches in enumerate(stages):
        for batch in () if number in without else batches:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
    return model


def recorded(stages: list[list[Batch]], path: Path) -> nn.Module:
    """The same loop, recorded."""
    model = pretrained()
    optimizer = optimizer_of(model)
    with culpa.record(path, culpa.Problem(model, loss), optimizer, overwrite=True) as recorder:
        for name, batches in zip(STAGES, stages, strict=True):
            with recorder.stage(name):
                for batch in recorder.batches(batches):
                    optimizer.zero_grad()
                    loss(model, batch).backward()
                    optimizer.step()
    return model


def seconds(work: Callable[[], object]) -> float:
    """Of the processor, by this thread."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def study(updates: int, folder: Path) -> str:
    """The page."""
    data, (inputs, targets) = images("train", 2000), images("test", 600)
    stages = [batches_of(number, data, updates) for number in range(len(STAGES))]
    path = folder / "run"
    trained, live = train(stages), recorded(stages, path)
    unchanged = all(map(torch.equal, trained.state_dict().values(), live.state_dict().values()))
    pairs = [
        (seconds(lambda: train(stages)), seconds(lambda: recorded(stages, path))) for _ in range(2)
    ]
    overhead = min(b for _, b in pairs) / min(a for a, _ in pairs) - 1

    run, problem = culpa.open_run(path), culpa.Problem(pretrained(), loss)
    again = culpa.replay(run, problem)
    replayed = all(torch.equal(again.state[n], p) for n, p in trained.named_parameters())
    statistics = all(torch.equal(again.buffers[n], b) for n, b in trained.named_buffers())

    pets = (targets == CAT) | (targets == DOG)
    behaviours = [
        culpa.log_likelihood("cats and dogs", (inputs[pets], targets[pets])),
        culpa.log_likelihood("the other classes", (inputs[~pets][:200], targets[~pets][:200])),
    ]
    embedded = culpa.embed(run, problem)
    lines: list[str] = []
    for behaviour in behaviours:
        estimates = embedded.effect(behaviour)
        whole = behaviour.values(trained.eval())
        for number, name in enumerate(STAGES):
            truth = whole - behaviour.values(train(stages, {number}).eval())
            same = culpa.agreement(estimates[number], truth)
            cells = (
                behaviour.name,
                name,
                f"{truth.mean():+.4f}",
                f"{estimates[number].mean():+.4f}",
            )
            lines.append(f"| {' | '.join(cells)} | {same.pearson:.3f} | {same.sign:.2f} |")
    accuracy = (trained(inputs).argmax(1) == targets).double().mean()
    yes = {True: "yes", False: "NO"}
    return "\n".join(
        [
            "# A CIFAR-10 ResNet-20, fine-tuned in stages",
            "",
            f"Made by `python examples/cifar_resnet.py --updates {updates}`: ResNet-20 with"
            f" pretrained weights, three stages of {updates} updates of {ROWS} augmented images"
            f" (SGD, rate {RATE}, momentum 0.9), in the second of them cats and dogs have each"
            f" other's label. Accuracy afterwards {accuracy:.2f} on {len(targets)} test images."
            f" torch {torch.__version__}, {torch.get_num_threads()} thread.",
            "",
            f"* Recording left training as it was, bit for bit: {yes[unchanged]}.",
            f"* Replay gives the same bits, parameters: {yes[replayed]}, running statistics:"
            f" {yes[statistics]}.",
            f"* Recording cost {100 * overhead:.1f} % of the training thread's time (smaller of two"
            f" each; every stage's first update is executed a second time, one of {updates} here).",
            "",
            "Effects of the stages on the log-likelihood (nats) of test images: the truth is the"
            " same loop without the stage, the estimate `culpa.embed` as it comes; correlation and"
            " agreement of signs are over test images.",
            "",
            "| behaviour | stage | true effect | estimate | correlation | same sign |",
            "|---|---|---|---|---|---|",
            *lines,
            "",
        ]
    )


def main() -> None:
    """Print the page, or write it."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--updates", type=int, default=8)
    arguments.add_argument("--out", type=Path)
    chosen = arguments.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        page = study(chosen.updates, Path(folder))
    if chosen.out:
        chosen.out.write_text(page, encoding="utf-8")
    else:
        print(page)


if __name__ == "__main__":
    main()
