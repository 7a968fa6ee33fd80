"""Attention that runs on the kernels training runs on, and has second derivatives all the same.

torch's fused attention has none, so that derivatives were taken by its composition of plain
operations instead: other bits than the loop's, and some twenty operations on scores to be
differentiated twice. Written out, with S = s Q K^T + mask, P = softmax(S), o = P V, g the cotangent
of o, and <.> the sum over a row:

    T = g V^T,  D = P (T - <P T>),     gQ = s D K,  gK = s D^T Q,  gV = P^T g

and for cotangents a, b, c of gQ, gK, gV, with U = s (a K^T + Q b^T), u = <P U>, W = P (U - u),
R = U (T - <P T>) - u T + g c^T and E = P (R - <P R>), those

    of g:  W V + P c        of V:  W^T g
    of Q:  s (D b + E K)    of K:  s (D^T a + E^T Q)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

SOURCE = "Dao, Fu, Ermon, Rudra, Re, FlashAttention, NeurIPS 2022 (the first derivative)"
_WIDE = (torch.float32, torch.float64)
_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # pyright: ignore[reportPrivateUsage]
_FUSED_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # pyright: ignore[reportPrivateUsage]


def written_out(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool
) -> bool:
    """Whether torch would take the kernel that ``attend`` takes, and the mask is a constant."""
    if any(t.device.type != "cpu" or t.ndim != 4 for t in (query, key, value)):
        return False
    if any(t.dtype not in _WIDE for t in (query, key, value)) or query.shape[1] != key.shape[1]:
        return False
    if mask is not None and (mask.requires_grad or mask.dtype not in (query.dtype, torch.bool)):
        return False
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        chosen = torch._fused_sdp_choice(query, key, value, mask, 0.0, causal)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    return chosen == SDPBackend.FLASH_ATTENTION.value


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """Attention of ``[B, heads, T, d]`` to ``[B, heads, T', d]``, with the bits of torch's kernel.

    Args:
        query, key, value: see ``torch.nn.functional.scaled_dot_product_attention``.
        mask: added to the scores, or, of booleans, which of them count.
        causal: whether no position attends to a later one.
        scale: of the scores; ``None``: d ** -.5.

    Returns:
        ``[B, heads, T, d]``. Reverse mode only; differentiable twice.
    """
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -math.inf)
    found: Any = _Attend.apply(query, key, value, mask, causal, scale)
    return found


class _Attend(Function):
    """(Q, K, V) -> o."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float | None,
    ) -> Tensor:
        """torch's kernel."""
        out, total = _FUSED(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
        ctx.save_for_backward(query, key, value, out, total, mask)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        """By ``_Backward``, which can be differentiated."""
        query, key, value, out, total, mask = ctx.saved_tensors
        here = out.detach(), total, mask, ctx.causal, ctx.scale
        found: Any = _Backward.apply(cotangents[0], query, key, value, *here)
        return *found, None, None, None


class _Backward(Function):
    """(g, Q, K, V) -> (gQ, gK, gV), with the derivative of the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        total: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """torch's kernel."""
        ctx.save_for_backward(g, query, key, value, mask)
        ctx.causal, ctx.scale = causal, scale
        return _FUSED_BACKWARD(
            g, query, key, value, out, total, 0.0, causal, attn_mask=mask, scale=scale
        )

    @staticmethod
    @once_differentiable  # its type has no names of parameters
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *cotangents: Tensor
    ) -> tuple[Tensor | None, ...]:
        """The names are those of the module's docstring."""
        a, b, c = cotangents
        g, query, key, value, mask = ctx.saved_tensors
        s = query.shape[-1] ** -0.5 if ctx.scale is None else ctx.scale
        scores = (s * query) @ key.mT
        if ctx.causal:
            later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu_(1)
            scores.masked_fill_(later, -math.inf)
        if mask is not None:
            scores += mask
        p = torch.ops.aten._safe_softmax(scores, -1)  # a row of nothing attends to nothing
        t = g @ value.mT
        level = (p * t).sum(-1, keepdim=True)
        d = p * (t - level)
        u = s * (a @ key.mT + query @ b.mT)
        mean = (p * u).sum(-1, keepdim=True)
        w = p * (u - mean)
        r = (u * (t - level)).addcmul_(mean, t, value=-1.0).add_(g @ c.mT)
        e = p * (r - (p * r).sum(-1, keepdim=True))
        of_query = s * (d @ b + e @ key)
        of_key = s * (d.mT @ a + e.mT @ query)
        return w @ value + p @ c, of_query, of_key, w.mT @ g, None, None, None, None, None
