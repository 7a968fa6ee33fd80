"""Convolutions whose second derivatives are convolutions of the usual sizes.

torch differentiates the backward pass of a convolution by three or four convolutions, one of them
with a kernel as large as the picture. In y = x * w (and gx, gw its backward pass from g) everything
is linear in each of g, x and w, so for cotangents h of gx and a of gw

    of g:  h * w + x * a
    of x:  what the backward pass from g gives for a convolution with the kernel a
    of w:  what it gives for a convolution of h

and the last two are one call of torch's backward kernel.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Weights = Literal["twice", "once", "never"]
_WIDE = (torch.float32, torch.float64)


class Geometry(NamedTuple):
    """How a kernel lies on a picture; numbers for each dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def geometry(
    dimensions: int, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Geometry | None:
    """The arguments of ``torch.conv1d`` and its like; ``None`` for padding by name."""
    if isinstance(padding, str):
        return None

    def each(value: Any) -> tuple[int, ...]:
        given = (value,) if isinstance(value, int) else tuple(value)
        return given * dimensions if len(given) == 1 else given

    return Geometry(each(stride), each(padding), each(dilation), groups)


def written_out(inputs: Tensor, weight: Tensor) -> bool:
    """Whether ``convolve`` can take the place of torch's: a batch, in one wide dtype."""
    return inputs.ndim == weight.ndim and inputs.dtype == weight.dtype and inputs.dtype in _WIDE


def convolve(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, at: Geometry, weights: Weights = "twice"
) -> Tensor:
    """``torch.conv1d``, ``conv2d`` or ``conv3d``. Reverse mode only; differentiable twice.

    ``weights``: what a backward pass that is itself differentiated gives by weight and bias: a
    gradient that can be differentiated, one that cannot, or none (curvature/apart.py, which takes
    them another way).
    """
    found: Any = _Convolve.apply(inputs, weight, bias, at, weights)
    return found


class _Convolve(Function):
    """(x, w, bias) -> y."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, at: Geometry, weights: Weights
    ) -> Tensor:
        """torch's."""
        ctx.save_for_backward(x, w)
        ctx.at, ctx.weights = at, weights
        return _forward(x, w, bias, at)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiable once more."""
        (g,) = cotangents
        x, w = ctx.saved_tensors
        of_x, of_w, of_bias, _, _ = ctx.needs_input_grad
        by_w = by_bias = None
        if ctx.weights != "twice" and torch.is_grad_enabled():
            if ctx.weights == "once":
                with torch.no_grad():
                    _, by_w, by_bias = _backward(g, x, w, ctx.at, (False, of_w, of_bias))
            of_w = of_bias = False
        found: Any = _Backward.apply(g, x, w, ctx.at, (of_x, of_w)) if of_x or of_w else (None,) * 2
        by_bias = g.sum([0, *range(2, g.ndim)]) if of_bias else by_bias
        return found[0], found[1] if of_w else by_w, by_bias, None, None


class _Backward(Function):
    """(g, x, w) -> (gx, gw), those that are ``wanted``, with the module's derivative."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, w: Tensor, at: Geometry, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """torch's kernel."""
        ctx.save_for_backward(g, x, w)
        ctx.at = at
        ctx.set_materialize_grads(False)
        return _backward(g, x, w, at, (*wanted, False))[:2]

    @staticmethod
    @once_differentiable  # its type has no names of parameters
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *cotangents: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Of (g, x, w); the names are those of the module's docstring."""
        h, a = cotangents
        g, x, w = ctx.saved_tensors
        of_g = None if h is None else _forward(h, w, None, ctx.at)
        if a is not None:
            along = _forward(x, a, None, ctx.at)
            of_g = along if of_g is None else of_g.add_(along)
        _, x_too, w_too, _, _ = ctx.needs_input_grad
        wanted = a is not None and x_too, h is not None and w_too, False
        # Where one is missing, what stands for it says nothing but its shape.
        of_x, of_w, _ = _backward(g, x if h is None else h, w if a is None else a, ctx.at, wanted)
        return of_g, of_x, of_w, None, None


def _forward(x: Tensor, w: Tensor, bias: Tensor | None, at: Geometry) -> Tensor:
    flat = (0,) * len(at.stride)
    return torch.convolution(x, w, bias, at.stride, at.padding, at.dilation, False, flat, at.groups)


def _backward(
    g: Tensor, x: Tensor, w: Tensor, at: Geometry, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """By x, w and the bias, those that are wanted."""
    if not any(wanted):
        return None, None, None
    flat, sizes = (0,) * len(at.stride), [len(w)] if wanted[2] else None
    found = torch.ops.aten.convolution_backward(
        g, x, w, sizes, at.stride, at.padding, at.dilation, False, flat, at.groups, [*wanted]
    )
    of_x, of_w, of_bias = (f if need else None for f, need in zip(found, wanted, strict=True))
    return of_x, of_w, of_bias
