"""Models whose derivatives are missing, or wrong in silence, and a plain loop that records them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import culpa

Batch = tuple[Tensor, Tensor]


class Norm(nn.Module):
    """LayerNorm without affine parameters, from primitives: differentiable any number of times."""

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()


class Once(torch.autograd.Function):
    """tanh, whose backward cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (1 - ctx.saved_tensors[0] ** 2)


class Silent(torch.autograd.Function):
    """tanh, whose backward can be differentiated, wrongly: it holds its slope for constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = (1 - x.detach().tanh() ** 2).detach()
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.slope


class Apply(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)  # type: ignore[no-any-return]


class Last(nn.Module):
    """An LSTM's last output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x.unflatten(1, (2, 2)))[0][:, -1]  # type: ignore[no-any-return]


def net(*middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), *middle, nn.Linear(6, 3)).double()


def data(count: int, size: int = 8) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 4, generator=generator, dtype=torch.float64),
            torch.randint(3, (size,), generator=generator),
        )
        for _ in range(count)
    ]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def recorded(
    folder: Path,
    model: nn.Module,
    batches: Sequence[Any],
    function: Callable[[nn.Module, Any], Tensor] = loss,
    rate: float = 0.02,
) -> tuple[culpa.Run, culpa.Problem]:
    problem = culpa.Problem(model, function)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.5)
    half = len(batches) // 2
    with culpa.record(folder, problem, optimizer) as recorder:
        for name, part in (("early", batches[:half]), ("late", batches[half:])):
            with recorder.stage(name):
                for batch in recorder.batches(part):
                    optimizer.zero_grad()
                    function(model, batch).backward()
                    optimizer.step()
    return culpa.open_run(folder), problem


def asked() -> list[culpa.Behaviour]:
    return [culpa.log_likelihood("right", data(1, 5)[0])]
