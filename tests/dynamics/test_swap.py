"""A module's tensors replaced for a call: all of them, wherever they are, whatever has changed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import culpa
from culpa.swap import Places


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        self.body[2].weight = self.body[0].weight
        self.again = self.body[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.body(x))


def replaced(model: nn.Module) -> dict[str, Tensor]:
    everything = dict(model.named_parameters()) | dict(model.named_buffers())
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.rand(value.shape, generator=generator)
        if value.is_floating_point()
        else value.clone()
        for name, value in everything.items()
    }


def agree(model: nn.Module, places: Places) -> None:
    model.eval()
    x, tensors = torch.randn(5, 4), replaced(model)
    twin = copy.deepcopy(model)  # functional_call would be shorter: it unties what it restores
    with torch.no_grad():
        for name, value in (*twin.named_parameters(), *twin.named_buffers()):
            value.copy_(tensors[name])
    expected, own = twin(x), model(x)
    assert not torch.equal(own, expected)
    with places.swapped(tensors):
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), own)


def test_every_place_of_a_tensor_is_swapped_and_given_back() -> None:
    model = Tied()
    places = Places(model)
    for _ in range(2):
        agree(model, places)


def test_what_changed_in_the_meantime_is_found() -> None:
    model = Tied()
    places = Places(model)
    agree(model, places)
    model.body[2] = nn.Linear(4, 4)  # another child, no longer tied
    agree(model, places)
    model.body[0].weight = nn.Parameter(torch.rand(4, 4))  # another tensor in the same place
    agree(model, places)
    model.body[2].weight = model.body[0].weight  # tied again
    agree(model, places)
    model.body[0].register_parameter("bias", None)  # fewer tensors
    agree(model, places)
    model.body[0].register_parameter("bias", nn.Parameter(torch.rand(4)))
    agree(model, places)
    model.body.append(nn.Linear(4, 4))
    agree(model, places)
    model.body[0].register_parameter("scale", nn.Parameter(torch.ones(1)))
    scale = torch.zeros(1)
    with places.swapped({"body.0.scale": scale}):
        assert model.body[0].scale is scale


def test_an_error_inside_gives_everything_back() -> None:
    model = Tied()
    places, own = Places(model), model.body[0].weight
    with pytest.raises(RuntimeError, match="inside"), places.swapped(replaced(model)):
        raise RuntimeError("inside")
    with pytest.raises(culpa.ProblemError, match="no parameter or buffer 'head'"):  # noqa: SIM117
        with places.swapped({"body.0.weight": torch.zeros(4, 4), "head": torch.zeros(1)}):
            pass
    assert model.body[0].weight is own
    assert model.body[2].weight is own
