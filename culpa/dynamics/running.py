"""Which buffers are running statistics, and arithmetic on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase  # pyright: ignore[reportPrivateUsage]

from culpa import tree
from culpa.errors import UnsupportedError
from culpa.trajectory.state import State
from culpa.tree import Tree

_KINDS = ("running_mean", "running_var", "num_batches_tracked")


def names(first: State, last: State) -> tuple[str, ...]:
    """The running statistics that training moved, with the counts of batches that go with them.

    Raises:
        UnsupportedError: if training changed any other floating-point buffer.
    """
    found: list[str] = []
    for name, value in last.buffers.items():
        kind = name.rpartition(".")[2] in _KINDS
        if name not in first.buffers:
            if kind:
                raise unknown(name, "the model got only during training")
        elif torch.equal(first.buffers[name], value):
            continue
        elif kind:
            found.append(name)
        elif value.is_floating_point():
            raise unknown(name, "training changed")
    return tuple(found)


def require_layers(model: nn.Module, running: Sequence[str]) -> None:
    """Raise ``UnsupportedError`` unless BatchNorm or InstanceNorm layers keep these buffers."""
    for name in running:
        if not isinstance(model.get_submodule(owner_of(name)), _NormBase):
            raise unknown(name, "training changed")


def shifted(buffers: Mapping[str, Tensor], displacement: Mapping[str, Tensor]) -> Tree:
    """``buffers - displacement``, with no variance below zero.

    In the block form a variance can get there by rounding only; in the additive form, which is
    linear, also because it extrapolates.
    """
    moved = tree.subtract({n: buffers[n] for n in displacement}, displacement)
    return {
        n: v.clamp(min=0) if n.rpartition(".")[2] == "running_var" else v for n, v in moved.items()
    }


def floating(statistics: Mapping[str, Tensor]) -> Tree:
    """Without the counts of batches."""
    return {name: value for name, value in statistics.items() if value.is_floating_point()}


def unknown(name: str, what: str) -> UnsupportedError:
    """The error for a buffer that is not modelled as part of the state."""
    return UnsupportedError(
        f"{what} the buffer {name!r}, and the only buffers that are modelled as part of the state"
        " are the running statistics of torch's BatchNorm and InstanceNorm layers."
        " culpa.replay(run, problem, without=stage) gives the exact effect for such models."
    )


def owner_of(name: str) -> str:
    """The module that a buffer belongs to."""
    return name.rpartition(".")[0]
