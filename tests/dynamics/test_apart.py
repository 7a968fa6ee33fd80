"""Products whose linear layers are taken apart: those of the whole gradient, whatever the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from culpa.dynamics.curvature.apart import Slopes, apart
from culpa.dynamics.local import differentiable_twice
from culpa.problem import Problem
from culpa.tree import Tree


class Tied(nn.Module):
    """The weight of the embedding is that of the output, and one layer has more uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.twice = nn.Linear(5, 5)
        self.norm = nn.LayerNorm(5)
        self.out = nn.Linear(5, 7, bias=False)
        self.out.weight = self.embedding.weight
        self.unused = nn.Linear(2, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = torch.tanh(self.twice(self.embedding(tokens)))
        bias, weight = self.twice.bias, self.twice.weight
        return self.out(self.norm(torch.addmm(bias.exp(), torch.addmm(bias, x, weight), weight)))


def _pictures() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def _plain(model: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def _penalised(model: nn.Module, batch: Any) -> Tensor:
    """Weights have a part in the loss beside their layers'."""
    return _plain(model, batch) + 0.1 * sum(p.square().sum() ** 2 for p in model.parameters())


def _smooth(model: nn.Module, batch: Any) -> Tensor:
    """A loss that differentiates by the parameters itself."""
    loss = _plain(model, batch)
    slopes = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    return loss + sum(s.square().sum() for s in slopes)


def _normed() -> nn.Module:
    made = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 4))
    nn.utils.parametrizations.weight_norm(made[2])
    return made


CASES: dict[str, tuple[Callable[[], nn.Module], Any, Callable[..., Tensor]]] = {
    "tied": (Tied, (torch.tensor([1, 3, 3, 6]), torch.tensor([3, 3, 6, 0])), _plain),
    "tied, penalised": (Tied, (torch.tensor([1, 3]), torch.tensor([3, 2])), _penalised),
    "pictures": (_pictures, (torch.randn(3, 2, 7, 7), torch.tensor([0, 2, 1])), _plain),
    "weight norm": (_normed, (torch.randn(6, 3), torch.arange(6) % 4), _plain),
    "differentiated inside": (_normed, (torch.randn(6, 3), torch.arange(6) % 4), _smooth),
}


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_whole_gradient(name: str) -> None:
    make, batch, loss = CASES[name]
    torch.manual_seed(1)
    model = make().double()
    batch = tuple(b.double() if b.is_floating_point() else b for b in batch)
    problem = Problem(model, loss)
    leaves = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
    vectors = [{n: torch.randn_like(p) for n, p in leaves.items()} for _ in range(2)]

    def value() -> Tensor:
        return problem.loss_at(leaves, {}, batch)

    with differentiable_twice():
        made, mode = apart(value, leaves)
        assert bool(mode.layers) is (loss is not _smooth)
        slopes = Slopes(made, leaves, mode)
        found = [slopes.pull(v) for v in vectors]
    for v, product in zip(vectors, found, strict=True):
        torch.testing.assert_close(product, _truth(problem, leaves, batch, v))


def _truth(problem: Problem, leaves: Tree, batch: Any, v: Tree) -> Tree:
    """torch alone: the gradient of <gradient, v>."""
    inputs = list(leaves.values())
    loss = problem.loss_at(leaves, {}, batch)
    grads = torch.autograd.grad(
        loss, inputs, create_graph=True, allow_unused=True, materialize_grads=True
    )
    slope = torch.stack([(g * v[n]).sum() for g, n in zip(grads, leaves, strict=True)]).sum()
    second = torch.autograd.grad(slope, inputs, allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, second, strict=True))


def test_the_gradient_by_a_weight_is_not_computed() -> None:
    made: list[tuple[int, ...]] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mm.default:
                made.append(tuple(out.shape))
            return out

    layer = nn.Linear(11, 13)
    leaves = {n: p.detach().requires_grad_() for n, p in layer.named_parameters()}
    problem = Problem(layer, lambda m, b: m(b).square().sum())
    with differentiable_twice(), Watch():
        value, mode = apart(lambda: problem.loss_at(leaves, {}, torch.randn(5, 11)), leaves)
        slopes = Slopes(value, leaves, mode)
        assert made == []
        slopes.pull({n: torch.randn_like(p) for n, p in leaves.items()})
    assert len(made) == 1
