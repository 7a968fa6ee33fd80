"""CelebA in the layout it is published in, and packed as small JPEGs.

Its agreement allows non-commercial research and no redistribution: images are read where they are,
and no page, figure or part that is kept ever holds one. It is never downloaded here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from culpa.errors import IntegrityError, OptionError
from culpa.experiments.data import pictures
from culpa.experiments.data.folder import DataFolder
from culpa.experiments.data.packed import unpacked

FOLDER, PACKED = "celeba", "celeba64.npz"
IMAGES, ATTRIBUTES, PARTITION = (
    "img_align_celeba",
    "list_attr_celeba.txt",
    "list_eval_partition.txt",
)
HOW = (
    f"Get {IMAGES}, {ATTRIBUTES} and {PARTITION} from its authors"
    " (mmlab.ie.cuhk.edu.hk/projects/CelebA.html; the agreement forbids passing images on) and put"
    f" them into a folder '{FOLDER}', as torchvision has them."
)
STAND_IN = "10,000 CelebA images of its training part, 64 x 64 pixels, for all 202,599."


@dataclass(frozen=True)
class Faces:
    """Attributes of all images; pixels come when they are asked for.

    ``train``: which belong to the training part. ``source``: the folder, or the packed file.
    """

    names: tuple[str, ...]
    attributes: Bool[Tensor, "images attributes"]
    train: Bool[Tensor, " images"]
    files: tuple[str, ...]
    source: Path
    stand_in: str = ""

    def has(self, name: str) -> Bool[Tensor, " images"]:
        """Who has the attribute, such as ``"Blond_Hair"``."""
        if name not in self.names:
            raise OptionError(f"CelebA has no attribute {name!r}; it has {', '.join(self.names)}.")
        return self.attributes[:, self.names.index(name)]

    def images(self, rows: Sequence[int], size: int) -> Tensor:
        """uint8 ``[n, 3, size, size]``: the largest square in the middle, resized."""
        if self.source.is_dir():
            return pictures.read([self.source / IMAGES / self.files[r] for r in rows], size)
        with np.load(self.source, allow_pickle=False) as arrays:
            small = unpacked(arrays["jpeg"], arrays["offsets"], rows)
        return torch.cat([pictures.resized(image.permute(1, 2, 0), size) for image in small])


def celeba(data: DataFolder, *, required: bool = False) -> Faces:
    """CelebA from its folder, or, unless the whole is ``required``, from ``celeba64.npz``.

    Raises:
        OptionError: it is in none of the folders, or a file of it is missing.
        IntegrityError: a table is damaged.
    """
    folder = data.first(FOLDER)
    if folder is not None:
        return _published(folder)
    packed = None if required else data.first(PACKED)
    if packed is None:
        raise data.absent("CelebA", (FOLDER,) if required else (FOLDER, PACKED), HOW)
    with np.load(packed, allow_pickle=False) as arrays:
        names = tuple(str(name) for name in arrays["attr_names"])
        given: np.ndarray[Any, Any] = arrays["attrs"]
        attributes = torch.from_numpy(given.astype(bool))
    return Faces(
        names, attributes, torch.ones(len(attributes), dtype=torch.bool), (), packed, STAND_IN
    )


def _published(folder: Path) -> Faces:
    for name in (IMAGES, ATTRIBUTES, PARTITION):
        if not (folder / name).exists():
            raise OptionError(f"{folder} has no {name}: it is no whole CelebA. {HOW}")
    lines = (folder / ATTRIBUTES).read_text().splitlines()
    if len(lines) < 3 or not lines[0].strip().isdigit():
        raise IntegrityError(
            f"{folder / ATTRIBUTES} should begin with the number of images and the attributes'"
            " names."
        )
    names, rows = tuple(lines[1].split()), [line.split() for line in lines[2:] if line.strip()]
    if len(rows) != int(lines[0]) or any(len(row) != 1 + len(names) for row in rows):
        raise IntegrityError(
            f"{folder / ATTRIBUTES} announces {lines[0].strip()} images with {len(names)}"
            f" attributes, and has {len(rows)} rows, not all of that length."
        )
    parts = dict(
        line.split()[:2] for line in (folder / PARTITION).read_text().splitlines() if line.strip()
    )
    missing = [row[0] for row in rows if row[0] not in parts]
    if missing:
        raise IntegrityError(f"{folder / PARTITION} does not know {missing[0]}.")
    values = torch.tensor([[value == "1" for value in row[1:]] for row in rows])
    train = torch.tensor([parts[row[0]] == "0" for row in rows])
    return Faces(names, values, train, tuple(row[0] for row in rows), folder)
