"""The state s_k of training before update k, and its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from culpa import tree
from culpa.errors import IntegrityError
from culpa.trajectory import digest, raw, tensors
from culpa.trajectory.raw import Raw
from culpa.tree import Slots, Tree


@dataclass(frozen=True)
class State:
    """s_k = (parameters, buffers, optimizer slots). Parameters no optimizer holds are not in it.

    ``slots`` maps a slot's name (``"momentum_buffer"``, ``"exp_avg"``, ``"step"``, ...) to tensors
    by parameter name; an optimizer that has not stepped yet has none.
    """

    params: Tree
    buffers: Tree = field(default_factory=dict[str, Tensor])
    slots: Slots = field(default_factory=dict[str, dict[str, Tensor]])

    def clone(self) -> State:
        """A copy that shares no memory."""
        return State(
            tree.clone(self.params), tree.clone(self.buffers), tree.clone_slots(self.slots)
        )

    def placed(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> State:
        """Where a model has its tensors: what is read from files is on the CPU.

        So an optimizer of them takes its slots, too. ``step`` and plain numbers stay on the CPU, as
        ``Optimizer.load_state_dict`` leaves them.
        """
        slots = {
            slot: values if slot == "step" or ":" in slot else placed(values, params)
            for slot, values in self.slots.items()
        }
        return State(placed(self.params, params), placed(self.buffers, buffers), slots)

    def flat(self) -> Tree:
        """All tensors under path-like names, as they stand in a state's file."""
        flat = {f"params/{name}": value for name, value in self.params.items()}
        flat |= {f"buffers/{name}": value for name, value in self.buffers.items()}
        for slot, values in self.slots.items():
            flat |= {f"slots/{slot}/{name}": value for name, value in values.items()}
        return flat

    @classmethod
    def unflatten(cls, flat: Mapping[str, Tensor]) -> State:
        """The inverse of ``flat``; raises ``IntegrityError`` on a name that is no such path."""
        state = cls({})
        for path, value in flat.items():
            kind, _, name = path.partition("/")
            slot, _, held = name.partition("/")
            if kind == "params" and name:
                state.params[name] = value
            elif kind == "buffers" and name:
                state.buffers[name] = value
            elif kind == "slots" and slot and held:
                state.slots.setdefault(slot, {})[held] = value
            else:
                raise IntegrityError(f"it holds a tensor {path!r} that is no part of a state")
        return state

    def digest(self) -> bytes:
        """Of every tensor in it, slots included."""
        return digest.combine(digest.tensor_digests(self.flat()))

    def step_digests(self) -> list[bytes]:
        """Of parameters and buffers, tensor by tensor: what every update's record holds."""
        named = {f"params/{name}": value for name, value in self.params.items()}
        named |= {f"buffers/{name}": value for name, value in self.buffers.items()}
        return digest.tensor_digests(named)

    def encode(self) -> bytes:
        """The bytes of its file: safetensors, on the CPU, contiguous."""
        return raw.encode(raws(self.flat()))

    @classmethod
    def decode(cls, data: bytes | memoryview, cut: tensors.Cut | None = None) -> State:
        """Read a state's file, or parts of its tensors.

        Raises:
            IntegrityError: if it is not one.
        """
        return cls.unflatten(tensors.load(memoryview(data), cut))


def placed(values: Mapping[str, Tensor], beside: Mapping[str, Tensor]) -> Tree:
    """Each tensor on the device of the one of its name in ``beside``; without one, as it is."""
    return {n: v.to(device_of(beside[n])) if n in beside else v for n, v in values.items()}


def device_of(like: Tensor) -> torch.device:
    """Where a tensor is; for one on the meta device, where tensors are made."""
    return torch.get_default_device() if like.is_meta else like.device


def on_model(model: nn.Module, values: Mapping[str, Tensor]) -> Tree:
    """Parameters or buffers where a model has its own: ready to be computed with."""
    return placed(values, {**dict(model.named_parameters()), **dict(model.named_buffers())})


def on_cpu(values: Mapping[str, Tensor]) -> Tree:
    """Tensors as results hold them, whatever the model is on; those on the CPU are no copies."""
    return {name: value.detach().cpu() for name, value in values.items()}


def raws(tree: Mapping[str, Tensor]) -> list[Raw]:
    """Tensors by path as bytes on the CPU; those of contiguous tensors there are no copies."""
    return [
        Raw(path, digest.dtype_name(v.dtype), tuple(v.shape), digest.raw_bytes(v.detach().cpu()))
        for path, v in tree.items()
    ]


def largest_difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> tuple[str, float]:
    """The name of the tensor that differs most between two trees, wherever, and by how much."""
    worst, most = "", 0.0
    for name in sorted(a.keys() | b.keys()):
        if name not in a or name not in b or a[name].shape != b[name].shape:
            return name, float("inf")
        one, other = a[name].detach(), b[name].detach().to(a[name].device)
        if torch.equal(one, other):
            continue
        gap = (one.double() - other.double()).abs()
        size = float("inf") if bool(torch.isnan(gap).any()) else float(gap.max())
        if not worst or size > most:
            worst, most = name, size
    return worst, most


def file_size(state: State) -> int:
    """The bytes of a state's file, without making it: tensors, and their names and shapes."""
    flat = state.flat()
    header = sum(len(name) + 80 + 12 * value.ndim for name, value in flat.items())
    return 16 + header + sum(value.nbytes for value in flat.values())
