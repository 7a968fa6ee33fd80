"""Copies of parameters and buffers, as recording takes one at every update.

Tensors of one dtype and device are copied end to end into one piece of memory: one kernel instead
of one a tensor, one transfer from a GPU, and bytes that lie as the digests want them. On a GPU the
piece goes into pinned memory without waiting; whoever reads it waits for the transfer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from blake3 import blake3
from torch import Tensor

from culpa.trajectory.digest import dtype_name, header
from culpa.trajectory.state import State
from culpa.tree import Slots

Kind = tuple[torch.device, torch.dtype]


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: elements [start, stop) of a piece."""

    kind: Kind
    start: int
    stop: int
    shape: torch.Size


class Plan:
    """How the tensors of a module are laid out in a copy, as long as their shapes stay."""

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        self.facts = _facts(named.values())
        self.members: dict[Kind, list[str]] = {}
        self.places: dict[str, Place] = {}
        ends: dict[Kind, int] = {}
        for name, value in named.items():
            kind, start = (value.device, value.dtype), ends.get((value.device, value.dtype), 0)
            ends[kind] = start + value.numel()
            self.members.setdefault(kind, []).append(name)
            self.places[name] = Place(kind, start, ends[kind], value.shape)
        self._hashed = [  # in the order of names: what each digest begins with, and which bytes
            (
                blake3(header(name, dtype_name(place.kind[1]), tuple(place.shape))),
                place.kind,
                place.start * place.kind[1].itemsize,
                place.stop * place.kind[1].itemsize,
            )
            for name, place in sorted(self.places.items())
        ]

    def digests(self, pieces: Mapping[Kind, Tensor]) -> list[bytes]:
        """``digest.tensor_digests`` of a copy."""
        data = {kind: piece.view(torch.uint8).numpy().data for kind, piece in pieces.items()}
        return [
            begun.copy().update(data[kind][start:stop]).digest()
            for begun, kind, start, stop in self._hashed
        ]


@dataclass(frozen=True)
class Snapshot:
    """A copy on the CPU, some of it perhaps still on its way there."""

    plan: Plan
    pieces: Mapping[Kind, Tensor]
    arrivals: tuple[torch.cuda.Event, ...] = ()

    def step_digests(self) -> list[bytes]:
        """As ``State.step_digests``."""
        return self.plan.digests(self._arrived())

    def state(self, slots: Slots | None = None) -> State:
        """The state with these slots; its parameters and buffers are views of the copy."""
        pieces, state = self._arrived(), State({}, {}, slots or {})
        for path, place in self.plan.places.items():
            value = pieces[place.kind][place.start : place.stop].view(place.shape)
            kind, _, name = path.partition("/")
            (state.params if kind == "params" else state.buffers)[name] = value
        return state

    def _arrived(self) -> Mapping[Kind, Tensor]:
        for event in self.arrivals:
            event.synchronize()
        return self.pieces


class Camera:
    """Takes snapshots of live parameters and buffers, by name."""

    def __init__(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        self._live = {f"params/{name}": value for name, value in params.items()}
        self._live |= {f"buffers/{name}": value for name, value in buffers.items()}
        self._plan = Plan(self._live)

    @torch.no_grad()
    def take(self) -> Snapshot:
        """A copy of everything as it is now."""
        if _facts(self._live.values()) != self._plan.facts:
            self._plan = Plan(self._live)  # somebody set a parameter's .data to another shape
        pieces: dict[Kind, Tensor] = {}
        arrivals: list[torch.cuda.Event] = []
        for kind, names in self._plan.members.items():
            piece = torch.cat([self._live[name].reshape(-1) for name in names])
            device = kind[0]
            if device.type == "cuda":
                host = torch.empty_like(piece, device="cpu", pin_memory=True)
                host.copy_(piece, non_blocking=True)
                arrived = torch.cuda.Event()
                arrived.record(torch.cuda.current_stream(device))
                arrivals.append(arrived)
                piece = host
            pieces[kind] = piece.cpu()
        return Snapshot(self._plan, pieces, tuple(arrivals))


def _facts(values: Iterable[Tensor]) -> list[tuple[torch.Size, torch.dtype, torch.device]]:
    return [(v.shape, v.dtype, v.device) for v in values]
