"""Attention with hand-written derivatives, against torch's own and finite differences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from culpa.dynamics.attention import attend, written_out
from culpa.dynamics.by_kernel import ByKernel
from culpa.dynamics.local import differentiable_twice

MASKS = ("none", "causal", "added", "booleans", "a row of nothing")


def point(seed: int, length: int = 5, keys: int = 5) -> list[Tensor]:
    torch.manual_seed(seed)
    shapes = ((2, 3, length, 4), (2, 3, keys, 4), (2, 3, keys, 4))
    return [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]


def mask_of(kind: str, length: int = 5, keys: int = 5) -> Tensor | None:
    if kind == "added":
        return torch.randn(2, 1, length, keys, dtype=torch.float64)
    if kind == "booleans":
        return torch.rand(length, keys) > 0.3
    if kind == "a row of nothing":
        return torch.arange(length)[:, None] > torch.zeros(keys)
    return None


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / (b.norm() + 1e-300)).detach())


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 2**31),
    st.sampled_from(MASKS),
    st.sampled_from([(5, 5), (3, 6), (6, 3)]),
    st.sampled_from([None, 0.7]),
)
def test_both_derivatives_are_those_of_plain_operations(
    seed: int, kind: str, lengths: tuple[int, int], scale: float | None
) -> None:
    inputs, causal = point(seed, *lengths), kind == "causal"
    mask = mask_of(kind, *lengths)
    weights, into = torch.randn(2, 3, lengths[0], 4).double(), [torch.randn_like(x) for x in inputs]
    found: list[list[Tensor]] = []
    with sdpa_kernel(SDPBackend.MATH):
        for way in ("plain", "ours"):
            if way == "plain":
                out = scaled_dot_product_attention(*inputs, mask, 0.0, causal, scale=scale)
            else:
                out = attend(*inputs, mask, causal, scale)
            first = torch.autograd.grad((weights * out**3).sum(), inputs, create_graph=True)
            across = torch.stack([(g * v).sum() for g, v in zip(first, into, strict=True)]).sum()
            found.append([out, *first, *torch.autograd.grad(across, inputs)])
    for truth, mine in zip(*found, strict=True):
        assert relative(mine, truth) < 1e-9


@pytest.mark.parametrize("kind", MASKS)
def test_derivatives_are_those_of_finite_differences(kind: str) -> None:
    inputs, mask = point(0, 3, 3), mask_of(kind, 3, 3)

    def way(*qkv: Tensor) -> Tensor:
        return attend(*qkv, mask, kind == "causal", None)

    assert torch.autograd.gradcheck(way, inputs)
    assert torch.autograd.gradgradcheck(way, inputs)


@pytest.mark.parametrize("kind", MASKS[:4])
def test_it_has_the_bits_of_the_kernel_that_training_takes(kind: str) -> None:
    inputs = [x.detach().float().requires_grad_() for x in point(1)]
    mask, causal = mask_of(kind), kind == "causal"
    mask = mask.float() if kind == "added" and mask is not None else mask
    g = torch.randn(2, 3, 5, 4)
    out = scaled_dot_product_attention(*inputs, mask, 0.0, causal)
    truth = [out, *torch.autograd.grad(out, inputs, g)]
    with differentiable_twice(), ByKernel():
        mine = scaled_dot_product_attention(*inputs, mask, 0.0, causal)
        assert "Attend" in str(mine.grad_fn)
        found = [mine, *torch.autograd.grad(mine, inputs, g, create_graph=True)]
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


def test_what_the_kernel_does_not_do_is_left_to_torch() -> None:
    q, k, v = (x.detach().requires_grad_() for x in point(2))
    learnt = torch.zeros(5, 5, dtype=torch.float64, requires_grad=True)
    assert written_out(q, k, v, None, False)
    assert not written_out(q, k, v, learnt, False)
    assert not written_out(q.bfloat16(), k.bfloat16(), v.bfloat16(), None, False)
    assert not written_out(q[0], k[0], v[0], None, False)
    assert not written_out(q, k[:, :1], v[:, :1], None, False)
    with differentiable_twice(), ByKernel():
        for given in (
            {"dropout_p": 0.5},
            {"attn_mask": learnt},
            {"key": k[:, :1], "value": v[:, :1], "enable_gqa": True},
        ):
            out = scaled_dot_product_attention(**({"query": q, "key": k, "value": v} | given))
            assert "Attend" not in str(out.grad_fn)
            torch.autograd.grad(out.sum(), q, create_graph=True)


def test_what_is_differentiable_twice_is_so_in_forward_mode_and_for_a_while() -> None:
    allowed = (
        torch.backends.cuda.math_sdp_enabled,
        torch.backends.cuda.flash_sdp_enabled,
        torch.backends.cuda.mem_efficient_sdp_enabled,
        torch.backends.cuda.cudnn_sdp_enabled,
        torch.backends.mha.get_fastpath_enabled,
    )
    before = [ask() for ask in allowed]
    query = torch.randn(1, 2, 5, 4, dtype=torch.float64)

    def attended(q: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, q, q).square().sum()

    with differentiable_twice():
        slope, step = torch.func.jvp(attended, (query,), (query,))[1], 1e-6
        ends = [float(attended(query * (1.0 + sign * step))) for sign in (1.0, -1.0)]
        assert float(slope) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-7)
        assert [ask() for ask in allowed] == [True, False, False, False, False]
    assert [ask() for ask in allowed] == before
    with pytest.raises(ZeroDivisionError), differentiable_twice():
        raise ZeroDivisionError
    assert [ask() for ask in allowed] == before
