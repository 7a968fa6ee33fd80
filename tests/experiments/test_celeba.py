"""CelebA's layout, and the experiment at its smallest on a generated folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import culpa
from culpa.experiments import celeba as experiment
from culpa.experiments.data.celeba import celeba
from culpa.experiments.data.folder import DataFolder
from experiments import generated
from experiments.smoke import claim, part, smoke


def test_smoke(tmp_path: Path) -> None:
    generated.celeba(tmp_path)
    result = smoke("celeba", tmp_path, DataFolder((tmp_path,)))
    stages = part(tmp_path, "celeba", "stages-0")
    assert min(stages["pearson"]["culpa's default (`effect`)"][0]) > 0.9
    removal = part(tmp_path, "celeba", "removal-0")
    order = np.argsort(removal["scores"][1])
    assert removal["top"]["stages"] == sorted(order[-2:])
    assert claim(result, "Skipping the bottom 1").holds == (removal["bottom"]["change"][1] > 0)
    # Nothing of an image leaves the folder of the runs.
    left = [f for f in (tmp_path / "smoke").rglob("*") if f.is_file() and "runs" not in f.parts]
    assert {f.suffix for f in left} == {".json"}
    assert all("href" not in f.read_text() for f in (tmp_path / "pages").rglob("*.svg"))


def test_the_layout_is_read(tmp_path: Path) -> None:
    folder = generated.celeba(tmp_path, count=12, train=8)
    faces = celeba(DataFolder((tmp_path,)), required=True)
    assert faces.train.tolist() == [True] * 8 + [False] * 4
    assert faces.has("Male").tolist() == [i % 2 == 0 for i in range(12)]
    assert faces.has("Blond_Hair").tolist() == [i // 2 % 2 == 0 for i in range(12)]
    images = faces.images([5, 0], 20)
    assert images.shape == (2, 3, 20, 20)
    whole = np.array(Image.open(folder / "img_align_celeba" / "000006.jpg"))
    assert torch.equal(images[0].permute(1, 2, 0), torch.from_numpy(whole[3:23]))
    assert float(faces.images([0], 8).float().mean()) == pytest.approx(190, abs=8)
    with pytest.raises(culpa.OptionError, match="no attribute 'Hat'"):
        faces.has("Hat")


def test_damaged_and_absent_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(culpa.OptionError, match=r"CelebA is not in .*mmlab"):
        celeba(DataFolder((tmp_path,)), required=True)
    folder = generated.celeba(tmp_path, count=4, train=4)
    (folder / "img_align_celeba" / "000002.jpg").unlink()
    faces = celeba(DataFolder((tmp_path,)))
    with pytest.raises(culpa.OptionError, match=r"000002\.jpg is in the table"):
        faces.images([1], 8)
    (folder / "img_align_celeba" / "000002.jpg").write_bytes(b"no jpeg")
    with pytest.raises(culpa.IntegrityError, match="is no image"):
        faces.images([1], 8)
    table = folder / "list_attr_celeba.txt"
    table.write_text(table.read_text().replace("4\n", "5\n", 1))
    with pytest.raises(culpa.IntegrityError, match="announces 5 images"):
        celeba(DataFolder((tmp_path,)))
    (folder / "list_eval_partition.txt").unlink()
    with pytest.raises(culpa.OptionError, match=r"no list_eval_partition\.txt"):
        celeba(DataFolder((tmp_path,)))


@pytest.mark.parametrize("train", [60, 80])
def test_training_and_test_images_are_apart_and_balanced(tmp_path: Path, train: int) -> None:
    generated.celeba(tmp_path, count=80, train=train)
    faces = celeba(DataFolder((tmp_path,)))
    options = experiment.Options(group=4)
    trained, tested = experiment.split(options, faces, 0)
    assert not set(trained) & set(tested)
    assert all(bool(faces.train[row]) for row in trained)
    groups = list(zip(faces.has("Blond_Hair")[tested], faces.has("Male")[tested], strict=True))
    assert all(groups.count(g) == 4 for g in groups)
    if train < 80:
        assert not bool(faces.train[tested].any())
        assert len(trained) == 60
    else:
        assert len(trained) == 80 - 16
    # The confounder takes women for blond.
    task, other = experiment.behaviours_of(experiment.Options(size=8), faces, tested)
    assert torch.equal(task.batch[1], faces.has("Blond_Hair")[tested].long())
    assert torch.equal(other.batch[1], 1 - faces.has("Male")[tested].long())
