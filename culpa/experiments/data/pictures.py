"""Reading image files with Pillow, at one size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from culpa.errors import IntegrityError, OptionError


def read(files: Sequence[Path], size: int, mode: str = "RGB") -> Tensor:
    """The largest square in the middle of each, resized: uint8 ``[n, channels, size, size]``.

    Args:
        files: in any format of Pillow's.
        size: pixels a side.
        mode: Pillow's: ``"RGB"`` or ``"L"``. Greyscale of 16 bits is scaled to 8.

    Raises:
        OptionError: Pillow, or a file, is missing.
        IntegrityError: a file is no image.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise OptionError(
            "images are read by Pillow, which is not installed. Run: pip install"
            " 'culpa[experiments]'."
        ) from error
    images: list[Tensor] = []
    for file in files:
        if not file.exists():
            raise OptionError(f"{file} is in the table of its data set, but not on disk.")
        try:
            with Image.open(file) as opened:
                deep = opened.mode.startswith("I") or opened.mode == "F"
                pixels = np.array(opened if deep else opened.convert(mode), dtype=np.float32)
        except (UnidentifiedImageError, OSError) as error:
            raise IntegrityError(f"{file} is no image: {error}.") from error
        if deep:
            pixels *= 255 / max(float(pixels.max()), 1.0)
            pixels = np.stack([pixels] * len(mode), axis=-1)
        images.append(resized(torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)), size))
    return torch.cat(images)


def resized(image: Tensor, size: int) -> Tensor:
    """One image ``[height, width, channels]`` to uint8 ``[1, channels, size, size]``."""
    side = min(image.shape[:2])
    top, left = ((length - side) // 2 for length in image.shape[:2])
    square = image[top : top + side, left : left + side].permute(2, 0, 1).unsqueeze(0).float()
    if side != size:
        square = interpolate(square, size=(size, size), mode="bilinear", antialias=True)
    return square.round().clamp(0, 255).byte()
