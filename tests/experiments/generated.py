"""Tiny data sets of no meaning in the layouts of the public ones."""

from __future__ import annotations

import csv
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def picture(file: Path, level: int, size: tuple[int, int] = (20, 26), mode: str = "RGB") -> None:
    """Noise about a grey level; ``size``: width and height."""
    draw = np.random.default_rng(zlib.crc32(file.name.encode()))
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    noise = draw.normal(level, 20, shape).clip(0, 255).astype(np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).save(file)


def rows_to(file: Path, rows: list[dict[str, Any]]) -> None:
    """A table with commas."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def celeba(root: Path, count: int = 80, train: int = 80) -> Path:
    """``celeba``: hair by turns of two, gender by turns of one; blond is bright."""
    folder = root / "celeba"
    names = ["Blond_Hair", "Male", "Smiling"]
    lines, parts = [str(count), " ".join(names)], []
    for i in range(count):
        name, blond, male = f"{i + 1:06d}.jpg", i // 2 % 2 == 0, i % 2 == 0
        picture(folder / "img_align_celeba" / name, 190 if blond else 60)
        lines.append(f"{name} {' '.join('1' if v else '-1' for v in (blond, male, i % 3 == 0))}")
        parts.append(f"{name} {0 if i < train else 2}")
    (folder / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    (folder / "list_eval_partition.txt").write_text("\n".join(parts) + "\n")
    return folder


def civilcomments(root: Path, count: int = 160) -> Path:
    """``civilcomments_v1.0``: every fourth toxic; identities by their words; a fifth for tests."""
    file = root / "civilcomments_v1.0" / "all_data_with_identities.csv"
    identities = ("male", "christian", "black", "other_religions")
    rows: list[dict[str, Any]] = []
    for i in range(count):
        toxic, mentioned = i % 4 == 0, identities[i // 4 % 4]
        text = f"{'awful' if toxic else 'kind'} words, {i}, with a comma on {mentioned}\nand a line"
        flags = {name: 0.8 if name == mentioned else 0.1 for name in identities}
        share = {"toxicity": 0.6 if toxic else 0.2}
        split = {"split": "test" if i % 5 == 4 else "train"}
        rows.append({"id": i, "comment_text": text, **split, **share, **flags})
    rows_to(file, rows)
    return file


def hospitals(root: Path, count: int = 40) -> None:
    """``ChestX-ray14``, ``PadChest`` and ``VinDr-CXR``: every third image with cardiomegaly."""
    found = [i % 3 == 0 for i in range(count)]
    nih, spain, vietnam = (root / name for name in ("ChestX-ray14", "PadChest", "VinDr-CXR"))
    tables: list[list[dict[str, Any]]] = [[], [], []]
    for i, ill in enumerate(found):
        level = 170 if ill else 80
        picture(nih / "images_001" / "images" / f"{i:08d}_000.png", level, mode="L")
        findings = "Cardiomegaly|Effusion" if ill else "No Finding"
        entry = {"Image Index": f"{i:08d}_000.png", "Finding Labels": findings}
        tables[0].append({**entry, "Patient ID": i // 2, "View Position": "PA"})
        picture(spain / "images" / f"{i}.png", level - 20, mode="L")
        labels = "['cardiomegaly', 'pleural effusion']" if ill else "['normal']"
        view = "L" if i == count - 1 else "PA"
        patient = {"ImageID": f"{i}.png", "PatientID": f"p{i}", "Projection": view}
        tables[1].append({**patient, "Labels": labels})
        picture(vietnam / "train" / f"v{i}.png", level + 20, mode="L")
        for reader, vote in (("R1", ill), ("R2", ill), ("R3", not ill)):
            vote_of = {"image_id": f"v{i}", "rad_id": reader, "Cardiomegaly": int(vote)}
            tables[2].append({**vote_of, "No finding": int(not vote)})
    rows_to(nih / "Data_Entry_2017.csv", tables[0])
    rows_to(spain / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv", tables[1])
    rows_to(vietnam / "annotations" / "image_labels_train.csv", tables[2])
