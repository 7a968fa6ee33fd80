"""MNIST, or where it is absent and may be replaced, the small digits that scikit-learn ships."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor
from torch.nn.functional import interpolate

from culpa.errors import IntegrityError, OptionError
from culpa.experiments.data.download import fetch
from culpa.experiments.data.folder import DataFolder

PACKED = "mnist.npz"
RAW = "MNIST/raw"
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
FILES = {
    "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
}
"""File and the MD5 of its .gz, as published."""
STAND_IN = (
    "scikit-learn's 1,797 digits of 8 x 8 pixels, enlarged to 28 x 28, for MNIST; the training set"
    " is correspondingly smaller."
)
TEST = 397
"""Of the stand-in's digits, the last so many are the test set."""
BYTES = 0x08
"""IDX's type code of unsigned bytes."""


@dataclass(frozen=True)
class Digits:
    """Images in [0, 1], in the data set's own order.

    ``stand_in``: what to say where they replace MNIST; empty for MNIST itself.
    """

    name: str
    images: Float32[Tensor, "train 1 28 28"]
    labels: Int64[Tensor, " train"]
    test_images: Float32[Tensor, "test 1 28 28"]
    test_labels: Int64[Tensor, " test"]
    stand_in: str = ""


def digits(data: DataFolder, *, required: bool) -> Digits:
    """MNIST; if it is absent and not ``required``, scikit-learn's digits.

    Raises:
        OptionError: MNIST is required and absent, or scikit-learn is absent too.
        IntegrityError: a file is damaged.
    """
    if required or data.download or data.first(PACKED, RAW) is not None:
        return mnist(data)
    return bundled()


def mnist(data: DataFolder) -> Digits:
    """MNIST from ``mnist.npz``, or from ``MNIST/raw`` as torchvision leaves it (gzipped or not)."""
    packed = data.first(PACKED)
    if packed is not None:
        with np.load(packed, allow_pickle=False) as arrays:
            parts = [arrays[n] for n in ("x_train", "y_train", "x_test", "y_test")]
        return _made(parts)
    folder = data.first(RAW)
    if folder is None and data.download:
        folder = data.roots[0] / RAW
        for name, md5 in FILES.items():
            fetch(tuple(f"{m}{name}.gz" for m in MIRRORS), md5, folder / f"{name}.gz")
    if folder is None:
        raise data.absent(
            "MNIST", (PACKED, RAW), "torchvision's MNIST folder will do, or pass --download."
        )
    return _made([_idx(folder, name) for name in FILES])


def bundled() -> Digits:
    """scikit-learn's digits, 28 x 28."""
    try:
        from sklearn.datasets import load_digits  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as error:
        raise OptionError(
            "there is neither MNIST nor scikit-learn, whose digits stand in for it. Run: pip"
            " install 'culpa[experiments]', or name a folder with MNIST (--data)."
        ) from error
    data: Any = load_digits()
    small = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    images = interpolate(small, size=(28, 28), mode="bilinear", align_corners=False)
    labels = torch.tensor(data.target, dtype=torch.int64)
    cut = len(labels) - TEST
    return Digits("digits", images[:cut], labels[:cut], images[cut:], labels[cut:], STAND_IN)


def _made(parts: list[np.ndarray[Any, np.dtype[np.uint8]]]) -> Digits:
    images = [torch.from_numpy(p.copy()).float().unsqueeze(1) / 255 for p in parts[::2]]
    labels = [torch.from_numpy(p.copy()).long() for p in parts[1::2]]
    return Digits("MNIST", images[0], labels[0], images[1], labels[1])


def _idx(folder: Path, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """An IDX file of unsigned bytes: 0, 0, type, dimensions, their big-endian sizes, the data."""
    plain, zipped = folder / name, folder / f"{name}.gz"
    file = plain if plain.exists() else zipped
    if not file.exists():
        raise OptionError(f"{folder} has neither {name} nor {name}.gz: it is no whole MNIST/raw.")
    try:
        content = file.read_bytes() if file == plain else gzip.decompress(file.read_bytes())
    except (EOFError, OSError) as error:
        raise IntegrityError(f"{file} cannot be unpacked: {error}.") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != BYTES:
        raise IntegrityError(f"{file} is no IDX file of unsigned bytes: it begins {content[:4]!r}.")
    ndim = content[3]
    shape = tuple(int(n) for n in np.frombuffer(content[4 : 4 + 4 * ndim], ">u4"))
    body = content[4 + 4 * ndim :]
    if len(shape) != ndim or len(body) != int(np.prod(shape)):
        raise IntegrityError(f"{file} announces shape {shape} and holds {len(body)} bytes.")
    return np.frombuffer(body, np.uint8).reshape(shape)
