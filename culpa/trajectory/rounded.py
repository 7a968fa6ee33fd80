"""Half the bytes for updates that wait: a state is told from the next one by 16 bits a number.

Rounding states would not do. Delta_t = s_{t+1} - s_t, which every score is linear in, is the
difference of two numbers that agree in more digits than bfloat16 has. Rounding the differences
would not do either: a moment before a sudden gradient is far smaller than what it grew by, and Adam
divides by it. So every coordinate is told from the next state's by

    rho = (s_{t+1} - s_t) / s_{t+1},  s_t = s_{t+1} (1 - rho),

where s_t / s_{t+1} is between 1/2 and 2, else by s_t itself. Rounded to 7 significant bits, so to a
relative 2^-7, either tells s_t as well as Delta_t: no sign changes, zeros stay zeros, what the
update did keeps 7 bits of every coordinate (6 where s_t itself is held), and a state n updates
before one that is held as it is has a relative error of at most n 2^-7, and typically of
sqrt(n) 2^-7 |rho|. What is held is a bfloat16 whose last bit says which of the two it is.

Of the types of 16 bits only bfloat16 has float32's range: in float16 second moments underflow.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from culpa.errors import OptionError
from culpa.tree import Tree

DROPPED = 17
"""Bits of a float32 that do not wait."""
BLOCK = 2**18
"""Numbers that are taken at a time, so that what is made on the way takes no memory."""


def require(dtype: torch.dtype | None) -> None:
    """Raise ``OptionError`` unless it is ``None`` or ``torch.bfloat16``."""
    if dtype is torch.float16:
        raise OptionError(
            "float16 cannot hold what waits: Adam's second moments are below its least number."
            " dtype=torch.bfloat16 has float32's range."
        )
    if dtype not in (None, torch.bfloat16):
        raise OptionError(
            f"dtype is None (updates wait as they are) or torch.bfloat16; got {dtype}."
        )


def rounds(value: Tensor) -> bool:
    """Whether it is float32, and more than one number: others wait as they are."""
    return value.dtype is torch.float32 and value.ndim > 0


def told_from(after: Tensor, before: Tensor) -> Tensor:
    """What tells ``before`` from ``after``, int16 of their shape. Cost: some ten passes."""
    told = torch.empty(after.shape, dtype=torch.int16, device=after.device)
    for end, start, out in _blocks(after, before, told):
        relative = (end - start).div_(end)
        near = (relative >= -1.0).logical_and_(relative <= 0.5)  # not where it is no number
        held = torch.where(near, relative, start).view(torch.int32)
        odd = held.bitwise_right_shift(DROPPED).bitwise_and_(1)
        held.add_(odd.add_((1 << (DROPPED - 1)) - 1))  # rounded, ties to even
        held.bitwise_right_shift_(DROPPED).bitwise_left_shift_(1).bitwise_or_(near)
        out.copy_(held)
    return told


def before(after: Tensor, told: Tensor) -> Tensor:
    """The inverse of ``told_from``, up to a relative 2^-7."""
    found = torch.empty(after.shape, dtype=after.dtype, device=after.device)
    for end, code, out in _blocks(after, told, found):
        held = code.bitwise_and(-2).view(torch.bfloat16).to(torch.float32)
        near = code.bitwise_and(1).bool()
        torch.where(near, torch.addcmul(end, end, held, value=-1.0), held, out=out)
    return found


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Stretches of tensors of one shape, the last of them contiguous, to be written to."""
    parts = [value.detach().reshape(-1).split(BLOCK) for value in tensors]
    return zip(*parts, strict=True)


def gradients(grads: Tree) -> Tree:
    """Gradients in bfloat16, but those that would not be smaller for it."""
    return {n: g.to(torch.bfloat16) if rounds(g) else g for n, g in grads.items()}
