"""Convolutions with hand-written second derivatives, against torch's own and finite differences."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from culpa.dynamics.by_kernel import ByKernel
from culpa.dynamics.convolution import convolve, geometry, written_out

TORCHES = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}


def drawn(size: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()


def both_derivatives(
    function: Any, inputs: list[Tensor], into: list[Tensor], wrt: list[int]
) -> list[Tensor]:
    asked = [inputs[i] for i in wrt]
    y = function(*inputs)
    loss = (y**3 * (torch.arange(y.numel()).reshape(y.shape) + 1.0).sin()).sum()
    first = torch.autograd.grad(loss, asked, create_graph=True)
    across = torch.stack([(g * into[i]).sum() for g, i in zip(first, wrt, strict=True)]).sum()
    return [y, *first, *torch.autograd.grad(across, asked)]


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 2),
    st.integers(1, 2),
    st.sampled_from([1, 2]),
    st.sampled_from([[0], [1], [2], [0, 1], [1, 2], [0, 1, 2]]),
    st.integers(0, 2**31),
)
def test_both_derivatives_are_torchs(
    dimensions: int,
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    wrt: list[int],
    seed: int,
) -> None:
    inputs = [
        drawn((2, 2 * groups, *(7, 6, 5)[:dimensions]), seed),
        drawn((groups * 2, 2, *(kernel,) * dimensions), seed + 1),
        drawn((groups * 2,), seed + 2),
    ]
    into = [drawn(tuple(x.shape), seed + 3 + i).detach() for i, x in enumerate(inputs)]
    given = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    at = geometry(dimensions, **given)
    assert at is not None
    truth = both_derivatives(partial(TORCHES[dimensions], **given), inputs, into, wrt)
    found = both_derivatives(partial(convolve, at=at), inputs, into, wrt)
    for mine, theirs in zip(found, truth, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-9)


def test_derivatives_are_those_of_finite_differences() -> None:
    at = geometry(2, stride=2, padding=(1, 0))
    assert at is not None
    inputs = [drawn((2, 2, 5, 4), 0), drawn((3, 2, 3, 3), 1), drawn((3,), 2)]
    assert torch.autograd.gradcheck(partial(convolve, at=at), inputs)
    assert torch.autograd.gradgradcheck(partial(convolve, at=at), inputs)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3, padding=1, bias=False),
        nn.Conv2d(4, 6, 3, stride=2, groups=2),
        nn.Conv2d(4, 6, 3, padding="same"),
        nn.Conv2d(4, 6, (3, 1), padding=(1, 0), padding_mode="reflect"),
        nn.Conv3d(4, 6, 2, dilation=2),
    ],
)
def test_layers_run_on_it(layer: Any) -> None:
    x = torch.randn(2, 4, *(6,) * (layer.weight.ndim - 2))
    with ByKernel():
        found = layer(x)
        alone = layer(x[0])  # without a batch: torch's
    assert torch.allclose(found, layer(x), atol=1e-6)
    assert torch.allclose(alone, layer(x[0]), atol=1e-6)


def test_autocast_convolves_in_half_precision_as_it_did_for_the_loop() -> None:
    layer, x = nn.Conv2d(2, 3, 3), torch.randn(4, 2, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        truth = layer(x)
        with ByKernel():
            found = layer(x)
    assert found.dtype is truth.dtype is torch.bfloat16
    assert torch.equal(found, truth)


def test_what_it_is_not_written_for_is_left_to_torch() -> None:
    wide = torch.randn(1, 1, 4, 4)
    assert written_out(wide, torch.ones(1, 1, 2, 2))
    assert not written_out(wide[0], torch.ones(1, 1, 2, 2))
    assert not written_out(wide.bfloat16(), torch.ones(1, 1, 2, 2).bfloat16())
    assert geometry(2, padding="same") is None
