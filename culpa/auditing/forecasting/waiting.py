"""What a recomputed update takes while it waits for the sweep, by where and how it is held."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from culpa.auditing.forecasting.stopwatch import Clock
from culpa.dynamics.graphs import Graphs
from culpa.dynamics.propagator import Exact, Propagator
from culpa.estimators.effects import running_statistics
from culpa.problem import Problem
from culpa.trajectory import rounded
from culpa.trajectory.hold import ANCHORED, Hold, InMemory, OnCpu, OnDisk
from culpa.trajectory.run import Run
from culpa.trajectory.state import State
from culpa.trajectory.walk import forward, session


@dataclass(frozen=True)
class Waiting:
    """Bytes of one update: where the model is, in the machine's memory besides, on disk."""

    beside: int
    machine: int = 0
    disk: int = 0

    def and_beside(self, size: int) -> Waiting:
        """With so many bytes more where the model is."""
        return Waiting(self.beside + size, self.machine, self.disk)

    def times(self, count: int) -> Waiting:
        """Of so many updates."""
        return Waiting(count * self.beside, count * self.machine, count * self.disk)


TIMED = 4
"""Updates whose graphs are made to find what one takes; the first is measured and not timed."""


@dataclass(frozen=True)
class Graphed:
    """Graphs of the replay that wait beside the updates.

    Attributes:
        size, budget: bytes of one, and of all at the most.
        made: seconds by which an update that leaves one is dearer.
        saved: seconds by which its product is cheaper: a forward and a backward pass.
    """

    size: int = 0
    budget: int = 0
    made: float = 0.0
    saved: float = 0.0

    def count(self, segment: int) -> int:
        """How many, of a segment of so many updates."""
        return min(segment, self.budget // self.size) if self.size else 0

    def memory(self, segment: int, measured: int) -> int:
        """Bytes more of one segment than of another."""
        return (self.count(segment) - self.count(measured)) * self.size

    def dearer(self, segment: int, measured: int) -> float:
        """Seconds of an update that were not measured on its replay and its share of a sweep.

        The sweep that was measured had segments of another length, and more of its updates a graph.
        """
        here, there = self.count(measured) / measured, self.count(segment) / segment
        return there * self.made + (here - there) * self.saved


def graphed(
    run: Run,
    problem: Problem,
    hold: Hold | None,
    propagator: Propagator | None,
    clock: Clock,
    pace: float,
) -> Graphed:
    """What ``culpa.attribute`` keeps of the updates after the last but one kept state.

    Args:
        pace: seconds of such an update without a graph.
    """
    hold = hold or InMemory()
    exact = propagator is None or isinstance(propagator, Exact)
    if not exact or not isinstance(hold, InMemory) or hold.dtype is not None:
        return Graphed()
    taker = Graphs(problem, hold.graphs, lambda: True, None, running_statistics(run, problem))
    at, seconds, size = run.kept_before(run.num_steps - 1), list[float](), 0
    with session(run, problem) as engine:
        last = clock()
        for transition in forward(run, engine, at, min(at + TIMED, run.num_steps), taker):
            if transition.graph is not None:
                size = transition.graph.size
                seconds.append(clock() - last)
            del transition
            last = clock()
    made = max(0.0, min(seconds[1:], default=pace) - pace)
    return Graphed(size, hold.graphs, made, pace)


def waiting(hold: Hold | None, state: State, batch: int) -> Waiting:
    """What an update takes with the state before it, its gradients and its batch of so many bytes.

    ``state``: one with all that the optimizer holds; every parameter in it counts as trained.
    """
    half = hold is not None and hold.dtype is not None
    moving = [*state.params.values(), *(v for slot in state.slots.values() for v in slot.values())]
    parts = _bytes(moving, half) + _bytes(state.params.values(), half)
    parts += _bytes(state.buffers.values(), False)
    if half:
        parts += sum(v.nbytes for v in moving if rounded.rounds(v)) // ANCHORED
    match hold:
        case OnDisk():
            return Waiting(batch, disk=parts)
        case OnCpu():
            return Waiting(batch, machine=parts)
        case _:
            return Waiting(batch + parts)


def _bytes(values: Iterable[Tensor], half: bool) -> int:
    return sum(v.nbytes // 2 if half and rounded.rounds(v) else v.nbytes for v in values)
