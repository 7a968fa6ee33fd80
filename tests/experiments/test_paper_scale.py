"""The paper's scale takes the paper's data and weights only, and says what is absent."""

from __future__ import annotations

from pathlib import Path

import pytest

import culpa
from culpa.experiments.data.folder import DataFolder
from culpa.experiments.frame.reproduce import reproduce
from culpa.experiments.registry import MODULES, experiment
from experiments import generated

STAND_INS = ("celeba64.npz", "cifar10.npz", "toxicity.parquet", "chestxray64.npz")
DATA = {
    "celeba": "CelebA",
    "civilcomments": "CivilComments",
    "xray": "ChestX-ray14",
    "backdoor": "CIFAR-10",
    "cost": "CelebA",
    "scaling": "CelebA",
}
"""What each asks for first; the others ask for MNIST."""


def refused(name: str, folder: Path) -> str:
    with pytest.raises(culpa.OptionError) as raised:
        reproduce(experiment(name), scale="paper", work=folder / "work", data=DataFolder((folder,)))
    assert not list((folder / "work").rglob("parts/*"))
    return str(raised.value)


@pytest.mark.parametrize("name", MODULES)
def test_stand_ins_are_refused_and_the_data_named(tmp_path: Path, name: str) -> None:
    for file in STAND_INS:
        (tmp_path / file).touch()
    said = refused(name, tmp_path)
    assert f"{DATA.get(name, 'MNIST')} is not in {tmp_path}" in said
    assert "--data" in said


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("celeba", "resnet18"),
        ("civilcomments", "gemma-3-270m"),
        ("cost", "resnet18"),
        ("scaling", "resnet18"),
        ("xray", "densenet121"),
    ],
)
def test_with_the_data_the_weights_are_asked_for(tmp_path: Path, name: str, weights: str) -> None:
    pytest.importorskip("transformers")
    generated.celeba(tmp_path)
    generated.civilcomments(tmp_path)
    generated.hospitals(tmp_path)
    said = refused(name, tmp_path)
    assert f"the pretrained model {weights}" in said
    assert "Hugging Face hub" in said
