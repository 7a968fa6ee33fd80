"""A tensor as a small PNG picture inside of the page, with nothing but zlib."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Final

import torch
from torch import Tensor

SMALLEST: Final = 4
"""Pixels a side from which on a tensor is taken for a picture."""
LARGEST: Final = 96
"""Pixels a side at most: larger pictures are thinned out, so that the page stays small."""


def image_shaped(value: Tensor) -> bool:
    """Whether it is ``[h, w]``, ``[1 or 3, h, w]`` or ``[h, w, 3]``, floating or of bytes."""
    if not (value.is_floating_point() or value.dtype == torch.uint8):
        return False
    shape = tuple(value.shape)
    if len(shape) == 3 and (shape[0] in (1, 3) or shape[2] == 3):
        shape = shape[1:] if shape[0] in (1, 3) else shape[:2]
    return len(shape) == 2 and min(shape) >= SMALLEST


def data_address(value: Tensor) -> str:
    """``data:image/png;base64,...`` of an image-shaped tensor.

    Bytes are shown as they are. Other numbers are stretched from the least (black) to the largest
    (white), over all channels together: normalised pictures have no scale of their own.
    """
    pixels = value.detach().cpu()
    if pixels.ndim == 3 and pixels.shape[0] in (1, 3):
        pixels = pixels.permute(1, 2, 0)
    if pixels.ndim == 2:
        pixels = pixels.unsqueeze(2)
    step = max(1, -(-max(pixels.shape[:2]) // LARGEST))
    png = _png(_bytes(pixels[::step, ::step]))
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _bytes(pixels: Tensor) -> Tensor:
    if pixels.dtype == torch.uint8:
        return pixels
    wide = torch.nan_to_num(pixels.double(), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = wide.min(), wide.max()
    if high <= low:
        return torch.zeros_like(wide, dtype=torch.uint8)
    return ((wide - low) / (high - low) * 255).round().to(torch.uint8)


def _png(pixels: Tensor) -> bytes:
    """uint8 ``[h, w, 1 or 3]``. Source: PNG (ISO/IEC 15948), filter 0, one IDAT chunk."""
    height, width, channels = pixels.shape
    lines = b"".join(b"\0" + bytes(line.flatten().tolist()) for line in pixels)
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
