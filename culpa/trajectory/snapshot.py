"""Copies of parameters and buffers, as recording takes one at every update.

Tensors of one dtype and device lie end to end in one piece of memory: one kernel instead of one a
tensor, and one transfer from a GPU. On a GPU the piece goes into pinned memory without waiting;
whoever reads it waits for the transfer. On a CPU it goes into the arena, if there is room.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from culpa.trajectory.arena import ALIGNMENT, Arena
from culpa.trajectory.digest import dtype_name
from culpa.trajectory.raw import Raw, digests
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
        self.starts: dict[Kind, int] = {}
        """The first byte of each piece, where they all lie in one region."""
        self.size = 0
        for kind, end in ends.items():
            self.starts[kind] = self.size
            self.size += -(-end * kind[1].itemsize // ALIGNMENT) * ALIGNMENT
        self.on_cpu = all(device.type == "cpu" for device, _ in ends)
        self._ends = ends
        self.described = [
            (
                *(path, dtype_name(p.kind[1]), tuple(p.shape), p.kind),
                *(p.start * p.kind[1].itemsize, p.stop * p.kind[1].itemsize),
            )
            for path, p in self.places.items()
        ]
        """Of each tensor: path, dtype, shape, piece, first byte in it and the one behind."""

    def laid(self, memory: Tensor) -> Laid:
        """The tensors where they lie in a region."""
        pieces: dict[Kind, Tensor] = {}
        for kind, start in self.starts.items():
            size = self._ends[kind] * kind[1].itemsize
            pieces[kind] = memory[start : start + size].view(kind[1])
        views = [pieces[p.kind][p.start : p.stop].view(p.shape) for p in self.places.values()]
        return Laid(views, pieces, self.raws(pieces))

    def raws(self, pieces: Mapping[Kind, Tensor]) -> list[Raw]:
        """The tensors as bytes, without copies."""
        data: dict[Kind, Any] = {k: p.view(torch.uint8).numpy().data for k, p in pieces.items()}
        return [
            Raw(path, dtype, shape, data[kind][start:stop])
            for path, dtype, shape, kind, start, stop in self.described
        ]


class Laid(NamedTuple):
    """What a copy in a region consists of."""

    views: list[Tensor]
    pieces: Mapping[Kind, Tensor]
    raws: list[Raw]


@dataclass
class Snapshot:
    """A copy on the CPU, some of it perhaps still on its way there."""

    plan: Plan
    pieces: Mapping[Kind, Tensor]
    arrivals: tuple[torch.cuda.Event, ...] = ()
    prepared: list[Raw] | None = None

    def raws(self) -> list[Raw]:
        """Its tensors as bytes, without copies."""
        # Prepared, as even a view of a tensor lets go of Python's lock, and the writer asks.
        return self.prepared or self.plan.raws(self.arrived())

    def step_digests(self) -> list[bytes]:
        """As ``State.step_digests``."""
        return digests(self.raws())

    def state(self, slots: Slots | None = None) -> State:
        """The state with these slots; its parameters and buffers are views of the copy."""
        pieces, state = self.arrived(), State({}, {}, slots or {})
        for path, place in self.plan.places.items():
            value = pieces[place.kind][place.start : place.stop].view(place.shape)
            kind, _, name = path.partition("/")
            (state.params if kind == "params" else state.buffers)[name] = value
        return state

    def arrived(self) -> Mapping[Kind, Tensor]:
        """Its pieces, once they are all there."""
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
    def take(self, arena: Arena | None = None) -> Snapshot:
        """A copy of everything as it is now."""
        live = self._live.values()
        if _facts(live) != self._plan.facts:
            self._plan = Plan(self._live)  # somebody set a parameter's .data to another shape
        plan = self._plan
        region = arena.take(plan.size) if arena is not None and plan.on_cpu else None
        if region is not None:
            laid = region.made(plan, plan.laid)
            torch._foreach_copy_(laid.views, [*live])  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
            return Snapshot(plan, laid.pieces, (), laid.raws)
        pieces: dict[Kind, Tensor] = {}
        arrivals: list[torch.cuda.Event] = []
        for kind, names in plan.members.items():
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
        return Snapshot(plan, pieces, tuple(arrivals))


def _facts(values: Iterable[Tensor]) -> list[tuple[torch.Size, torch.dtype, torch.device]]:
    return [(v.shape, v.dtype, v.device) for v in values]
