"""What the recorder of one rank reads off a model whose parameters all ranks hold together.

The state that is hashed and kept is the whole one: tensor by tensor it is gathered on every rank,
and the first one keeps a copy. Whatever a rank does by its own clock looks at its shards only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from culpa import tree
from culpa.problem import Problem
from culpa.trajectory.arena import Arena
from culpa.trajectory.observer import Observer
from culpa.trajectory.ranks import exchange
from culpa.trajectory.ranks.bare import reshard
from culpa.trajectory.ranks.group import FIRST, ranks
from culpa.trajectory.ranks.shards import shard
from culpa.trajectory.snapshot import Camera, Snapshot
from culpa.trajectory.state import State
from culpa.trajectory.together import Stepper
from culpa.tree import Slots, Tree


class ShardObserver(Observer):
    """An ``Observer`` of a sharded module. What gathers is collective."""

    def __init__(self, problem: Problem, optimizer: Stepper) -> None:
        reshard(problem.model)  # else a forward pass may have left whole parameters there
        super().__init__(problem, optimizer)

    def slots(self) -> Slots:
        """The optimizer's state, gathered: whole on the first rank, shards on the others."""
        return {
            slot: {name: _first_whole(value) for name, value in values.items()}
            for slot, values in self.live_slots().items()
        }

    def state(self, held: Mapping[str, Tensor], *, slots: bool) -> State:
        """See ``Observer``: whole on the first rank, shards on the others.

        Raises:
            RecordError: if a rank does not come to do the same.
        """
        # A rank with fewer batches would gather what another gathers in a forward pass.
        ranks().meet(exchange.PATIENCE)
        return State(
            {name: _first_whole(p) for name, p in held.items()},
            {name: b.detach().to("cpu", copy=True) for name, b in self.buffers.items()},
            self.slots() if slots else {},
        )

    def before(self, last: State, joining: Tree) -> State:
        """See ``Observer``: copies of this rank's shards, where they are."""
        shards = self._shards([*last.params, *joining])
        return State(tree.clone(shards.params), last.buffers, tree.clone_slots(shards.slots))

    def after(self, copied: State) -> State:
        """See ``Observer``: this rank's shards.

        Of parameters copies: whoever executes the update again does it where they are.
        """
        shards = self._shards(copied.params)
        return State(tree.clone(shards.params), copied.buffers, shards.slots)

    def comparable(self, state: State) -> State:
        """See ``Observer``: FSDP2 leaves buffers to every rank, and the first one's are kept."""
        return state if dist.get_rank() == FIRST else State(state.params, {}, state.slots)

    def _shards(self, names: Iterable[str]) -> State:
        live = self.live_state(names)
        return State(
            {name: _local(p).detach() for name, p in live.params.items()},
            {},
            {s: {n: _local(v).detach() for n, v in of.items()} for s, of in live.slots.items()},
        )

    def write(self, state: State, frozen: Tree) -> None:
        """See ``Observer``: into this rank's shards."""
        with torch.no_grad():
            for name, value in (frozen | state.params).items():
                self.live(name).copy_(_own(value, self.params[name]))
            for name, value in state.buffers.items():
                self.buffers[name].copy_(value)

    def placed(self, name: str, value: Tensor) -> Tensor:
        """See ``Observer``: this rank's shard of a slot."""
        p: Any = self.held[name]
        if not value.ndim or value.shape != p.shape:
            return value.to(p.device)
        own = _own(value, p).to(p.device, copy=True)
        facts = {"run_check": False, "shape": p.shape, "stride": p.stride()}
        return type(p.data).from_local(own, p.device_mesh, p.placements, **facts)

    def gathered(self) -> Observer:
        """See ``Observer``. Memory: all parameters and slots, on every rank."""
        return Gathered(self)

    def frozen(self) -> Tree:
        """See ``Observer``; on the first rank only."""
        found: Tree = {}
        for name, p in self.params.items():
            if name not in self.held:
                whole = _gathered(p)
                found |= {name: whole} if dist.get_rank() == FIRST else {}
        return found

    def gradients(self) -> Tree:
        """See ``Observer``: of this rank's shards."""
        held = self.held.items()
        return tree.clone({name: _local(p.grad) for name, p in held if p.grad is not None})

    def camera(self, held: Mapping[str, Tensor]) -> Camera:
        """What takes copies of the parameters in ``held`` and all buffers."""
        return ShardCamera(held, self.buffers)

    def require_unchanged(self, last: State, name: str) -> None:
        """See ``Observer``: of this rank's shards."""
        params = {n: _own(value, self.params[n]) for n, value in last.params.items()}
        super().require_unchanged(State(params, last.buffers), name)

    def live(self, name: str) -> Tensor:
        """This rank's shard of a parameter."""
        return _local(self.params[name])

    def versions(self) -> dict[str, tuple[int, int]]:
        """See ``Observer``: in place, both the shard and what stands for it may be changed."""
        return {
            name: (v._version + _local(v)._version, _local(v).data_ptr())
            for name, v in self._moving.items()
        }


class Gathered(Observer):
    """An observer of whole copies, which a rank looks at by itself."""

    def __init__(self, live: ShardObserver) -> None:
        self.__dict__.update(live.__dict__)
        self._slots: Slots = {
            slot: {name: _whole(value) for name, value in values.items()}
            for slot, values in live.live_slots().items()
        }
        self.params = {n: nn.Parameter(_whole(p), False) for n, p in live.params.items()}

    def slots(self) -> Slots:
        """See ``Observer``."""
        return self._slots


class ShardCamera(Camera):
    """Whole copies on the first rank, and copies of its shards on every other.

    Cost of one: all ranks gather every parameter, one after another.
    """

    def __init__(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        self._first = dist.get_rank() == FIRST
        self._params = {f"params/{name}": p for name, p in params.items()}
        shards = {name: _local(p) for name, p in params.items()}
        super().__init__(params if self._first else shards, buffers)

    @torch.no_grad()
    def take(self, arena: Arena | None = None) -> Snapshot:
        """A copy of everything as it is now."""
        if not self._first:
            for path, p in self._params.items():
                _gathered(p)
                self._live[path] = _local(p)
            return super().take(arena)
        plan = self._plan
        sizes = {kind: plan.places[names[-1]].stop for kind, names in plan.members.items()}
        pieces = {kind: torch.empty(size, dtype=kind[1]) for kind, size in sizes.items()}
        for name, place in plan.places.items():
            whole = _gathered(self._live[name])
            pieces[place.kind][place.start : place.stop].copy_(whole.reshape(-1))
        return Snapshot(plan, pieces)


def _gathered(value: Any) -> Tensor:
    """A tensor of the ranks together, whole; any other as it is."""
    gather = getattr(value.detach(), "full_tensor", None)
    return value.detach() if gather is None else gather()


def _whole(value: Tensor) -> Tensor:
    """A whole copy on the CPU."""
    return _gathered(value).to("cpu", copy=True)


def _first_whole(value: Tensor) -> Tensor:
    """A copy on the CPU: whole on the first rank, and a shard on the others. Collective."""
    whole = _gathered(value)
    return (whole if dist.get_rank() == FIRST else _local(value)).detach().to("cpu", copy=True)


def _local(value: Any) -> Tensor:
    return getattr(value, "_local_tensor", value)


def _own(last: Tensor, live: Any) -> Tensor:
    """This rank's shard of a copy, which may be that of the shard already."""
    local = _local(live)
    if last.shape != live.shape or local is live:
        return last
    return shard(last, dist.get_rank(), dist.get_world_size())
