"""The hospitals' layouts, and the experiment at its smallest on generated folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import culpa
from culpa.experiments import xray as experiment
from culpa.experiments.data.folder import DataFolder
from culpa.experiments.data.xray import hospitals
from experiments import generated
from experiments.smoke import claim, part, smoke


def test_smoke(tmp_path: Path) -> None:
    generated.hospitals(tmp_path)
    result = smoke("xray", tmp_path, DataFolder((tmp_path,)))
    assert claim(result, "culpa's default").holds
    assert claim(result, "AA-Score is what it sums up").holds
    found = part(tmp_path, "xray", "seed-0")
    assert np.shape(found["pearson"]["DVEmb"]) == (3, 3)
    text = (tmp_path / "pages" / "xray.md").read_text()
    assert "stage 2 is PadChest" in text
    assert "0.9809" in text


def test_the_three_layouts_are_read(tmp_path: Path) -> None:
    generated.hospitals(tmp_path, count=12)
    nih, spain, vietnam = hospitals(DataFolder((tmp_path,)), required=True)
    ill = [i % 3 == 0 for i in range(12)]
    assert nih.finding.tolist() == ill
    assert nih.patients == tuple(str(i // 2) for i in range(12))
    assert spain.finding.tolist() == ill[:11], "the lateral one is left out"
    assert vietnam.finding.tolist() == ill, "two of three readers decide"
    for place, shift in ((nih, 0), (spain, -20), (vietnam, 20)):
        images = place.images([3, 4], 10)
        assert images.shape == (2, 1, 10, 10)
        levels = images.float().mean((1, 2, 3)).tolist()
        assert levels == pytest.approx([170 + shift, 80 + shift], abs=8)


def test_absent_and_damaged_hospitals_are_named(tmp_path: Path) -> None:
    with pytest.raises(culpa.OptionError, match=r"ChestX-ray14 is not in .*nihcc"):
        hospitals(DataFolder((tmp_path,)))
    generated.hospitals(tmp_path, count=3)
    table = tmp_path / "VinDr-CXR" / "annotations" / "image_labels_train.csv"
    table.write_text(table.read_text().replace("Cardiomegaly", "Heart"))
    with pytest.raises(culpa.IntegrityError, match="no column 'Cardiomegaly'"):
        hospitals(DataFolder((tmp_path,)))
    table.unlink()
    with pytest.raises(culpa.OptionError, match=r"no annotations/image_labels_train\.csv"):
        hospitals(DataFolder((tmp_path,)))
    for file in (tmp_path / "PadChest" / "images").iterdir():
        file.unlink()
    with pytest.raises(culpa.OptionError, match="PadChest has no PNG or JPEG"):
        hospitals(DataFolder((tmp_path,)))


def test_the_stand_in_is_two_hospitals_by_patient(tmp_path: Path) -> None:
    arrays = {
        "x": np.arange(6, dtype=np.uint8).reshape(6, 1, 1).repeat(4, 1).repeat(4, 2),
        "source": np.array(["NIH"] * 3 + ["Guangzhou"] * 3),
        "abnormal": np.array([1, -1, 0, 0, 1, 1]),
        "patient": np.array([7, 7, 8, -1, -1, -1]),
        "file_name": np.array(
            ["a", "b", "c", "IM-0115-01.jpeg", "person3_virus_1.jpeg", "person3"]
        ),
    }
    np.savez(tmp_path / "chestxray64.npz", **arrays)
    nih, other = hospitals(DataFolder((tmp_path,)))
    assert (nih.name, other.name) == ("NIH", "Guangzhou")
    assert nih.finding.tolist() == [True, False]
    assert nih.patients == ("7", "8")
    assert other.patients == ("IM-0115", "person3", "person3")
    assert nih.images([1], 4).unique().tolist() == [2]
    with pytest.raises(culpa.OptionError, match="ChestX-ray14 is not in"):
        hospitals(DataFolder((tmp_path,)), required=True)


def test_no_patient_is_in_both_parts(tmp_path: Path) -> None:
    generated.hospitals(tmp_path, count=30)
    place = hospitals(DataFolder((tmp_path,)))[0]
    options = experiment.Options(train=15, test=9)
    trained, tested = experiment.split(options, place, 0)
    assert (len(trained), len(tested)) == (15, 9)
    assert not {place.patients[r] for r in trained} & {place.patients[r] for r in tested}
    assert experiment.split(options, place, 0) == (trained, tested)
    assert experiment.split(options, place, 1) != (trained, tested)


def test_features_are_those_below_the_last_layer(tmp_path: Path) -> None:
    generated.hospitals(tmp_path, count=4)
    place, data = hospitals(DataFolder((tmp_path,)))[0], DataFolder((tmp_path,))
    options = experiment.Options(network=experiment.SMALL, size=16)
    both = experiment.features_of(options, data, place, [0, 1])
    alone = experiment.features_of(options, data, place, [1])
    torch.testing.assert_close(both[1:], alone)
    assert both.shape == (2, 16)
