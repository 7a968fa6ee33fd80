"""JPEGs packed into one array with their offsets, as the files ``<data set>.npz`` have them."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from culpa.errors import IntegrityError, OptionError


def unpacked(
    content: np.ndarray[Any, np.dtype[np.uint8]],
    offsets: np.ndarray[Any, np.dtype[Any]],
    rows: Sequence[int],
    mode: str = "RGB",
) -> UInt8[Tensor, "images channels height width"]:
    """Some images: image i is the JPEG ``content[offsets[i]:offsets[i + 1]]``.

    Args:
        content: all files one after the other.
        offsets: one more than there are images.
        rows: which images, in the order wanted.
        mode: Pillow's: ``"RGB"`` or ``"L"``.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise OptionError(
            "packed JPEGs are read by Pillow, which is not installed. Run: pip install"
            " 'culpa[experiments]'."
        ) from error
    images: list[Tensor] = []
    for row in rows:
        file = content[int(offsets[row]) : int(offsets[row + 1])].tobytes()
        try:
            pixels = np.array(Image.open(BytesIO(file)).convert(mode))
        except (UnidentifiedImageError, OSError) as error:
            raise IntegrityError(f"packed image {row} is no JPEG: {error}.") from error
        images.append(torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1))
    return torch.stack(images)
