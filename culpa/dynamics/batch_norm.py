"""Batch normalisation whose second derivatives take as long as its first ones.

torch differentiates the backward pass of ``batch_norm`` by some thirty operations on whole
activations: a third of the time of a Hessian product with a ResNet. Written out it is one call of
torch's own backward kernel, one inner product for each channel, and a linear combination of three
tensors. With x^ = (x - m) r, r = (v + eps)^(-1/2), gamma the weight, <.> the mean over a channel:

    y  = gamma x^ + beta
    gx = gamma r A,   A = g - <g> - x^ <g x^>,   ggamma = sum g x^,   gbeta = sum g

and for cotangents h of gx, a of ggamma and b of gbeta, those

    of g:      gamma r (h - <h> - x^ <h x^>) + a x^ + b
    of gamma:  r sum h A
    of x:      r (C - <C> - x^ <C x^>) - gamma r^2 x^ <h A>,
               C = a g - gamma r (h <g x^> + g <h x^>)

The batch's mean and variance (with n - 1, which running statistics take) are outputs too, since a
sweep that carries running statistics needs their derivatives and the kernel has them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

SOURCE = "torch.nn.BatchNorm; Ioffe, Szegedy, Batch Normalization, ICML 2015"
_WIDE = (torch.float32, torch.float64)


def written_out(inputs: Tensor, weight: Tensor | None) -> bool:
    """Whether ``normalise`` can take the place of torch's: one wide dtype, and rows to average."""
    same = weight is None or weight.dtype == inputs.dtype
    return same and inputs.dtype in _WIDE and inputs.ndim > 1 and inputs.numel() > inputs.shape[1]


Running = tuple[Tensor | None, Tensor | None, float]
"""Running mean and variance, which move, and by which share."""


def normalise(
    inputs: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    running: Running = (None, None, 0.0),
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise by the batch: ``[B, C, ...]`` to the same shape, and the channels' mean, variance.

    Equal to ``torch.nn.functional.batch_norm(training=True)``, ``torch.mean`` and ``torch.var`` but
    for rounding. Reverse mode only; differentiable twice. ``running`` statistics are moved outside
    of autograd, by torch's kernel, as in training.
    """
    scale = inputs.new_ones(inputs.shape[1]) if weight is None else weight
    shift = inputs.new_zeros(inputs.shape[1]) if bias is None else bias
    found: Any = _Normalise.apply(inputs, scale, shift, eps, running)
    return found


class _Normalise(Function):
    """(x, gamma, beta) -> (y, the channels' mean, their variance)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, eps: float, running: Running
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See ``normalise``."""
        held, kept, share = running
        y, mean, root = torch.native_batch_norm(x, gamma, beta, held, kept, True, share, eps)
        count = x.numel() // x.shape[1]
        variance = (root.pow(-2) - eps).mul_(count / (count - 1))
        ctx.save_for_backward(x, gamma, mean, root)
        ctx.set_materialize_grads(False)
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of the three outputs, of which ``None`` plays no part."""
        of_y, of_mean, of_variance = cotangents
        x, gamma, mean, root = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        of_x = of_gamma = of_beta = None
        if of_y is not None:
            found: Any = _Backward.apply(of_y, x, gamma, mean, root)
            of_x, of_gamma, of_beta = found
        if of_mean is not None or of_variance is not None:
            zero = torch.zeros_like(mean)
            slope = (zero if of_variance is None else of_variance) * (2.0 / (count - 1))
            level = (zero if of_mean is None else of_mean) / count - slope * mean
            moved = torch.addcmul(_channels(level, x), x, _channels(slope, x))
            of_x = moved if of_x is None else of_x + moved
        return of_x, of_gamma, of_beta, None, None


class _Backward(Function):
    """(g, x, gamma) -> (gx, ggamma, gbeta), with the derivative of the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, root: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """torch's kernel."""
        of_x, of_gamma, total = _kernel(g, x, gamma, mean, root)
        ctx.save_for_backward(g, x, gamma, mean, root, of_gamma, total)
        return of_x, of_gamma, total

    @staticmethod
    @once_differentiable  # its type has no names of parameters
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *cotangents: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The names are those of the module's docstring; <.> is a mean over a channel."""
        h, a, b = cotangents
        g, x, gamma, mean, root, of_gamma, total = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        of_g, hx, hs = _kernel(h, x, gamma, mean, root)
        hx, hs, gx, gs = hx / count, hs / count, of_gamma / count, total / count
        over = [0, *range(2, x.ndim)]
        ha = (h * g).sum(over) / count - hs * gs - hx * gx  # <h A>
        scale = gamma * root
        # a x^ + b, as a line in x
        of_g += torch.addcmul(_channels(b - a * root * mean, x), x, _channels(a * root, x))
        # r (C - <C> - x^ <C x^>) - gamma r^2 x^ <h A>, as a line in x, h and g
        along_h, along_g = -root * scale * gx, root * (a - scale * hx)
        along_x = root * (2.0 * scale * hx * gx - a * gx - scale * ha) * root
        level = root * (scale * (hs * gx + gs * hx) - a * gs) - along_x * mean
        of_x = torch.addcmul(_channels(level, x), x, _channels(along_x, x))
        of_x.addcmul_(h, _channels(along_h, x)).addcmul_(g, _channels(along_g, x))
        return of_g, of_x, count * root * ha, None, None


def _kernel(
    g: Tensor, x: Tensor, gamma: Tensor, mean: Tensor, root: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """gx, ggamma, gbeta."""
    return torch.ops.aten.native_batch_norm_backward(
        g, x, gamma, None, None, mean, root, True, 0.0, [True, True, True]
    )


def _channels(values: Tensor, like: Tensor) -> Tensor:
    """``[C]`` as a row that goes with ``[B, C, ...]``."""
    return values.reshape(1, -1, *(1,) * (like.ndim - 2))
