"""Chest X-rays of several hospitals: ChestX-ray14, PadChest, VinDr-CXR, or small stand-ins."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch import Tensor

from culpa.errors import IntegrityError, OptionError
from culpa.experiments.data import pictures
from culpa.experiments.data.folder import DataFolder

FINDING = "Cardiomegaly"
NIH, PADCHEST, VINDR, PACKED = "ChestX-ray14", "PadChest", "VinDr-CXR", "chestxray64.npz"
TABLES = {
    NIH: ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv"),
    PADCHEST: ("PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv",),
    VINDR: ("annotations/image_labels_train.csv", "image_labels_train.csv"),
}
PATIENT = re.compile(r"person\d+|(NORMAL2-)?IM-\d+")
HOW = {
    NIH: "The National Institutes of Health publish it: nihcc.app.box.com/v/ChestXray-NIHCC.",
    PADCHEST: "BIMCV gives it to those who ask: bimcv.cipf.es/bimcv-projects/padchest.",
    VINDR: (
        "PhysioNet gives it to credentialed users: physionet.org/content/vindr-cxr; its DICOM files"
        " are to be converted to PNG, into the folder 'train'."
    ),
}
STAND_IN = (
    "two hospitals for three: 1,000 NIH ChestX-ray14 and 2,000 Guangzhou paediatric images of 64 x"
    ' 64 pixels; the label is "abnormal", the only one besides pneumonia that both have.'
)


@dataclass(frozen=True)
class Hospital:
    """Images of one hospital and whether each shows the finding.

    ``patients``: training and test images must not share one. ``pixels``: the images themselves,
    where they are not in ``files``.
    """

    name: str
    finding: Bool[Tensor, " images"]
    patients: tuple[str, ...]
    files: tuple[Path, ...] = ()
    pixels: UInt8[Tensor, "images 1 height width"] | None = None

    def images(self, rows: Sequence[int], size: int) -> Tensor:
        """uint8 ``[n, 1, size, size]``: the largest square in the middle, resized."""
        if self.pixels is None:
            return pictures.read([self.files[row] for row in rows], size, "L")
        return torch.cat(
            [pictures.resized(self.pixels[row].permute(1, 2, 0), size) for row in rows]
        )


def hospitals(data: DataFolder, *, required: bool = False) -> tuple[Hospital, ...]:
    """The paper's three, or, unless they are ``required``, what ``chestxray64.npz`` has.

    Raises:
        OptionError: one of the three is in none of the folders, or has no images there.
        IntegrityError: a table has not the columns it should have.
    """
    packed = None if required else data.first(PACKED)
    if packed is not None and data.first(NIH, PADCHEST, VINDR) is None:
        return _packed(packed)
    found: list[Hospital] = []
    for name, read in ((NIH, _nih), (PADCHEST, _padchest), (VINDR, _vindr)):
        folder = data.first(name)
        if folder is None:
            raise data.absent(name, (name,), HOW[name])
        tables = [folder / table for table in TABLES[name] if (folder / table).exists()]
        if not tables:
            raise OptionError(f"{folder} has no {' or '.join(TABLES[name])}. {HOW[name]}")
        found.append(read(folder, tables[0]))
    return tuple(found)


def _nih(folder: Path, table: Path) -> Hospital:
    rows = _rows(table, ("Image Index", "Finding Labels", "Patient ID"))
    return _present(
        folder,
        NIH,
        [
            (row["Image Index"], FINDING in row["Finding Labels"].split("|"), row["Patient ID"])
            for row in rows
        ],
    )


def _padchest(folder: Path, table: Path) -> Hospital:
    """Frontal projections only, as the other two have."""
    rows = _rows(table, ("ImageID", "Labels", "PatientID", "Projection"))
    return _present(
        folder,
        PADCHEST,
        [
            (row["ImageID"], f"'{FINDING.lower()}'" in row["Labels"].lower(), row["PatientID"])
            for row in rows
            if row["Projection"] in ("PA", "AP", "AP_horizontal")
        ],
    )


def _vindr(folder: Path, table: Path) -> Hospital:
    """Each image was read by several radiologists; the majority decides. No patients are told."""
    votes: dict[str, list[bool]] = {}
    for row in _rows(table, ("image_id", FINDING)):
        votes.setdefault(row["image_id"], []).append(float(row[FINDING]) > 0)
    entries = [(name, 2 * sum(v) > len(v), name) for name, v in votes.items()]
    return _present(folder, VINDR, entries)


def _present(folder: Path, name: str, entries: Sequence[tuple[str, bool, str]]) -> Hospital:
    """Those entries whose images are on disk, in any folder below: parts of a set will do."""
    files = {file.name: file for file in sorted(folder.rglob("*")) if _is_image(file)}
    files |= {file.stem: file for file in files.values()}
    kept = [(files[image], *rest) for image, *rest in entries if image in files]
    if not kept:
        raise OptionError(f"{folder} has no PNG or JPEG of those in its table. {HOW[name]}")
    return Hospital(
        name,
        torch.tensor([finding for _, finding, _ in kept], dtype=torch.bool),
        tuple(str(patient) for _, _, patient in kept),
        tuple(file for file, _, _ in kept),
    )


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in (".png", ".jpg", ".jpeg")


def _rows(table: Path, wanted: tuple[str, ...]) -> list[dict[str, Any]]:
    with table.open(newline="", encoding="utf-8-sig") as opened:
        reader = csv.DictReader(opened)
        missing = [name for name in wanted if name not in (reader.fieldnames or ())]
        if missing:
            raise IntegrityError(f"{table} has no column {missing[0]!r}.")
        return list(reader)


def _packed(file: Path) -> tuple[Hospital, ...]:
    with np.load(file, allow_pickle=False) as arrays:
        source, abnormal = arrays["source"], arrays["abnormal"]
        pixels = torch.from_numpy(arrays["x"].copy()).unsqueeze(1)
        patients = [
            _patient(int(number), str(file))
            for number, file in zip(arrays["patient"], arrays["file_name"], strict=True)
        ]
    found: list[Hospital] = []
    for name in dict.fromkeys(str(s) for s in source):
        rows = np.flatnonzero((source == name) & (abnormal >= 0)).tolist()
        found.append(
            Hospital(
                name,
                torch.from_numpy(abnormal[rows] == 1),
                tuple(patients[row] for row in rows),
                (),
                pixels[rows],
            )
        )
    return tuple(found)


def _patient(number: int, file: str) -> str:
    """Guangzhou's files are named after their patients: person12_virus_3.jpeg, IM-0115-01.jpeg."""
    if number >= 0:
        return str(number)
    known = PATIENT.match(file)
    return known.group() if known else file
