"""CIFAR-10 in the layouts it is published in, and packed as JPEGs."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from culpa.errors import IntegrityError, OptionError
from culpa.experiments.data.download import fetch
from culpa.experiments.data.folder import DataFolder
from culpa.experiments.data.packed import unpacked
from culpa.experiments.data.pickles import read_plain_pickle

PYTHON, BINARY, PACKED = "cifar-10-batches-py", "cifar-10-batches-bin", "cifar10.npz"
ADDRESS = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
TRAIN = tuple(f"data_batch_{i}" for i in range(1, 6))
ROW = 1 + 3 * 32 * 32
"""Bytes of an image in the binary layout: the label, then 1,024 each of red, green and blue."""
STAND_IN = "12,000 + 2,000 CIFAR-10 images, re-encoded as JPEG, for the whole of CIFAR-10."


@dataclass(frozen=True)
class Cifar10:
    """Images uint8 ``[n, 3, 32, 32]`` and labels; ``stand_in`` says what is not the original."""

    images: UInt8[Tensor, "train 3 32 32"]
    labels: Int64[Tensor, " train"]
    test_images: UInt8[Tensor, "test 3 32 32"]
    test_labels: Int64[Tensor, " test"]
    stand_in: str = ""


def cifar10(
    data: DataFolder,
    *,
    train: int | None = None,
    test: int | None = None,
    required: bool = False,
) -> Cifar10:
    """CIFAR-10, in the data set's own order.

    Looked for in this order: ``cifar-10-batches-bin`` (plain bytes), ``cifar-10-batches-py`` (what
    torchvision keeps; pickles, read by ``data/pickles.py`` without being executed), ``cifar10.npz``
    (JPEGs, 14,000 images). A download is of the binary layout: nothing in it could be code.

    Args:
        data: where to look.
        train, test: only so many of the first images; default all.
        required: the whole of it; ``cifar10.npz`` will not do.

    Raises:
        OptionError: it is in none of the folders, or a file of it is missing.
        IntegrityError: a file is damaged, or a pickle asks for more than plain data.
    """
    folder = data.first(BINARY, PYTHON)
    packed = None if required else data.first(PACKED)
    if folder is None and packed is None and data.download:
        folder = _downloaded(data.roots[0])
    if folder is not None:
        read = _binary if folder.name == BINARY else _pickled
        parts = [read(folder, TRAIN, train), read(folder, ("test_batch",), test)]
        return Cifar10(*parts[0], *parts[1])
    if packed is None:
        raise data.absent(
            "CIFAR-10",
            (BINARY, PYTHON) if required else (BINARY, PYTHON, PACKED),
            'torchvision\'s folder will do, or the "binary version" of its authors, or pass'
            " --download.",
        )
    with np.load(packed, allow_pickle=False) as arrays:
        parts = [_packed(arrays, "train", train), _packed(arrays, "test", test)]
    return Cifar10(*parts[0], *parts[1], STAND_IN)


def _binary(folder: Path, names: tuple[str, ...], count: int | None) -> tuple[Tensor, Tensor]:
    rows: list[Tensor] = []
    for name in names:
        file = _present(folder / f"{name}.bin")
        content = np.frombuffer(file.read_bytes(), np.uint8)
        if len(content) == 0 or len(content) % ROW:
            raise IntegrityError(f"{file} has {len(content)} bytes, no multiple of {ROW}.")
        rows.append(torch.from_numpy(content.reshape(-1, ROW).copy()))
    every = torch.cat(rows)[:count]
    return every[:, 1:].reshape(-1, 3, 32, 32).contiguous(), _labels(every[:, 0], folder)


def _pickled(folder: Path, names: tuple[str, ...], count: int | None) -> tuple[Tensor, Tensor]:
    images: list[Tensor] = []
    labels: list[int] = []
    for name in names:
        file = _present(folder / name)
        content = read_plain_pickle(file)
        found = {k.decode() if isinstance(k, bytes) else k: v for k, v in dict(content).items()}
        if not isinstance(found.get("data"), np.ndarray) or "labels" not in found:
            raise IntegrityError(f"{file} has no arrays 'data' and 'labels': no batch of CIFAR-10.")
        images.append(torch.from_numpy(found["data"].reshape(-1, 3, 32, 32).copy()))
        labels += [int(label) for label in found["labels"]]
    return torch.cat(images)[:count], _labels(torch.tensor(labels[:count]), folder)


def _packed(arrays: Any, part: str, count: int | None) -> tuple[Tensor, Tensor]:
    labels = torch.from_numpy(arrays[f"y_{part}"][:count].astype(np.int64))
    rows = range(len(labels))
    return unpacked(arrays[f"jpeg_{part}"], arrays[f"offsets_{part}"], rows), labels


def _labels(labels: Tensor, folder: Path) -> Tensor:
    if bool((labels > 9).any()) or bool((labels < 0).any()):
        raise IntegrityError(f"{folder} has labels outside of 0 to 9: it is not CIFAR-10.")
    return labels.long()


def _present(file: Path) -> Path:
    if not file.exists():
        raise OptionError(f"{file} is missing: {file.parent} is no whole CIFAR-10.")
    return file


def _downloaded(root: Path) -> Path:
    archive = fetch((ADDRESS,), MD5, root / "cifar-10-binary.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(archive.read_bytes())) as tar:
        tar.extractall(root, filter="data")
    return root / BINARY
