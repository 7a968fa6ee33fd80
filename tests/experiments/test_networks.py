"""The networks have their papers' sizes, and take weights of exactly their own shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import culpa
from culpa.experiments import densenet, weights
from culpa.experiments.data.folder import DataFolder
from culpa.experiments.resnet import PLACES, normalised, pretrained, resnet


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [
        ("resnet18", 1000, 11_689_512),  # torchvision's
        ("resnet34", 1000, 21_797_672),
        ("resnet20", 10, 269_722),  # the usual CIFAR-10 ones
        ("resnet32", 10, 464_154),
    ],
)
def test_resnets_have_their_size(name: str, classes: int, count: int) -> None:
    with torch.device("meta"):
        assert size(resnet(name, classes, 0)) == count


def test_densenet_has_its_size_and_torchvisions_names() -> None:
    with torch.device("meta"):
        model = densenet.DenseNet((6, 12, 24, 16), 32, 64, 1000)
    assert size(model) == 7_978_856
    names = model.state_dict().keys()
    assert "features.denseblock4.denselayer16.norm2.running_var" in names
    assert "features.transition3.conv.weight" in names


def test_outputs_and_seeds() -> None:
    before = torch.random.get_rng_state()
    models = [resnet("resnet18", 2, seed, width=4) for seed in (0, 0, 1)]
    assert torch.equal(before, torch.random.get_rng_state())
    first, same, other = ([p.detach() for p in m.parameters()] for m in models)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not torch.equal(first[0], other[0])
    images = normalised(torch.randint(0, 256, (3, 3, 32, 32)).byte())
    assert models[0](images).shape == (3, 2)
    assert densenet.small(0)(images).shape == (3, 10)
    small = resnet("resnet8", 2, 0, width=4)
    assert small(images).shape == (3, 2)


def weights_of(model: nn.Module, root: Path, place: str) -> Path:
    file = root / "models" / place
    file.parent.mkdir(parents=True, exist_ok=True)
    # As the published files: without the counts of batches.
    kept = {n: t for n, t in model.state_dict().items() if not n.endswith("num_batches_tracked")}
    save_file(kept, file)
    return file


def test_pretrained_weights_are_found_and_loaded(tmp_path: Path) -> None:
    there = resnet("resnet20", 10, 5)
    weights_of(there, tmp_path, PLACES["resnet20"])
    for root in (tmp_path, tmp_path / "data"):  # inside of the data folder, or beside it
        root.mkdir(exist_ok=True)
        ten, two = (pretrained("resnet20", n, 0, DataFolder((root,))) for n in (10, 2))
        assert torch.equal(ten.state_dict()["linear.weight"], there.state_dict()["linear.weight"])
        wanted = there.state_dict()["layer3.2.conv2.weight"]
        assert torch.equal(two.state_dict()["layer3.2.conv2.weight"], wanted)
        assert two.state_dict()["linear.weight"].shape == (2, 64)


def test_absent_and_wrong_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(culpa.OptionError, match=r"resnet18/model\.safetensors.*timm"):
        pretrained("resnet18", 2, 0, DataFolder((tmp_path,)))
    file = weights_of(resnet("resnet8", 10, 0), tmp_path, "resnet8.safetensors")
    with pytest.raises(culpa.OptionError, match=r"layer1\.1\.conv1\.weight is missing"):
        weights.load(resnet("resnet20", 10, 0), file)
    with pytest.raises(culpa.OptionError, match=r"linear\.weight has shape \(10, 64\)"):
        weights.load(resnet("resnet8", 2, 0), file)
    weights.load(resnet("resnet8", 2, 0), file, new=("linear",))
    save_file({"other": torch.zeros(1)}, file)
    with pytest.raises(culpa.OptionError, match="has not the weights"):
        weights.load(resnet("resnet8", 2, 0), file)
