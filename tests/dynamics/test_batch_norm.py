"""Batch normalisation with hand-written derivatives, against torch's own and finite differences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from culpa.dynamics.batch_norm import normalise, written_out
from culpa.dynamics.by_kernel import ByKernel

SHAPES = st.sampled_from([(5, 3), (4, 2, 7), (3, 2, 4, 5), (2, 1, 2, 3, 2)])


def torches(x: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
    """The oracle: the same three outputs by operations of torch alone."""
    over = [0, *range(2, x.ndim)]
    out = functional.batch_norm(x, None, None, gamma, beta, training=True, eps=1e-3)
    return out, x.mean(over), x.var(over)


def ours(x: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
    return normalise(x, gamma, beta, 1e-3)


def point(shape: tuple[int, ...], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def drawn(size: tuple[int, ...]) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()

    return [drawn(shape), drawn(shape[1:2]), drawn(shape[1:2])]


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / (b.norm() + 1e-300)).detach())


@settings(deadline=None, max_examples=25)
@given(SHAPES, st.integers(0, 2**31), st.sets(st.integers(0, 2), min_size=1))
def test_both_derivatives_are_torchs_whatever_outputs_play_a_part(
    shape: tuple[int, ...], seed: int, outputs: set[int]
) -> None:
    inputs = point(shape, seed)
    into = [torch.randn_like(x) for x in inputs]
    found: list[list[Tensor]] = []
    for way in (torches, ours):
        made = [way(*inputs)[i] for i in sorted(outputs)]
        weights = [(torch.arange(y.numel()).reshape(y.shape) + 1.0).sin() for y in made]
        loss = torch.stack([(w * y**3).sum() for w, y in zip(weights, made, strict=True)]).sum()
        first = torch.autograd.grad(
            loss, inputs, create_graph=True, allow_unused=True, materialize_grads=True
        )
        across = torch.stack([(g * v).sum() for g, v in zip(first, into, strict=True)]).sum()
        second = torch.autograd.grad(across, inputs, allow_unused=True, materialize_grads=True)
        found.append([*made, *first, *second])
    for truth, mine in zip(*found, strict=True):
        assert relative(mine, truth) < 1e-9 or float((mine - truth).detach().abs().max()) < 1e-11


@pytest.mark.parametrize("shape", [(5, 3), (3, 2, 2, 3)])
def test_derivatives_are_those_of_finite_differences(shape: tuple[int, ...]) -> None:
    inputs = point(shape, 0)
    assert torch.autograd.gradcheck(ours, inputs)
    assert torch.autograd.gradgradcheck(ours, inputs)


def test_models_run_on_it_and_move_their_statistics_as_always() -> None:
    torch.manual_seed(0)
    layers = [nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, momentum=None)]
    layers += [nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3).eval()]
    x = torch.randn(4, 3, 5, 5)
    for layer in layers:
        buffers = {name: value.clone() for name, value in layer.named_buffers()}
        truth = layer(x)
        moved = {name: value.clone() for name, value in layer.named_buffers()}
        layer.load_state_dict(buffers, strict=False)
        with ByKernel():
            found = layer(x)
        assert torch.allclose(found, truth, atol=1e-6)
        for name, value in layer.named_buffers():
            assert torch.allclose(value, moved[name], atol=1e-6), name


def test_what_it_is_not_written_for_is_left_to_torch() -> None:
    wide = torch.randn(2, 3)
    assert written_out(wide, torch.ones(3))
    assert not written_out(wide.bfloat16(), torch.ones(3))
    assert not written_out(wide, torch.ones(3, dtype=torch.float64))
    with ByKernel():
        layer = nn.BatchNorm1d(3).bfloat16()
        assert layer(wide.bfloat16()).dtype == torch.bfloat16
        with pytest.raises(ValueError, match="more than 1 value"):
            nn.BatchNorm1d(3)(torch.randn(1, 3))
