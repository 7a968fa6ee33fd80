"""Walking backward: recomputed updates wait, in memory or elsewhere, until their turn comes.

A segment between two kept states is executed forward and consumed from its end, so all its states
are there at once: O(sqrt(K)) of them. What that is for a large model may be more than the device,
or the machine, has; then they wait on the CPU, or on disk.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from safetensors.torch import load_file, save_file

from culpa.errors import OptionError
from culpa.trajectory.engine import Engine
from culpa.trajectory.run import Run
from culpa.trajectory.state import State
from culpa.trajectory.walk import Transition, forward
from culpa.tree import Tree


@runtime_checkable
class Hold(Protocol):
    """Where the updates of a segment wait."""

    def backwards(self, way: Iterable[Transition]) -> Iterator[Transition]:
        """The updates of ``way``, each the next one's predecessor, from the last to the first."""
        ...


@dataclass(frozen=True)
class InMemory:
    """The default: where the model is. Each is let go when the next one is asked for."""

    def backwards(self, way: Iterable[Transition]) -> Iterator[Transition]:
        """See ``Hold``."""
        held = list(way)
        while held:
            yield held.pop()


@dataclass(frozen=True)
class OnCpu:
    """In the machine's memory, for models on an accelerator. Their batches stay where they are.

    Cost: one transfer of a state and a gradient there and back for every update.
    """

    def backwards(self, way: Iterable[Transition]) -> Iterator[Transition]:
        """See ``Hold``."""
        held: list[_Slip] = []
        contents: list[Tree] = []
        last: State | None = None
        for transition in way:
            slip, content = _packed(transition, last)
            held.append(slip)
            contents.append({name: value.to("cpu") for name, value in content.items()})
            last = transition.after
        yield from _unpacked(held, contents.pop)


@dataclass(frozen=True)
class OnDisk:
    """In temporary files, for states of which memory does not hold many.

    Memory: about three states and two gradients, however long the segment; batches besides. Cost:
    one state and one gradient written and read for every update. The files are removed as they are
    used, and all of them if the sweep ends early.

    Args:
        folder: an existing one, on a disk with room for the states of a segment (``culpa.forecast``
            tells their number and ``culpa inspect`` a state's size); ``None``: the system's
            temporary folder.
    """

    folder: str | Path | None = None

    def __post_init__(self) -> None:
        """Check the folder."""
        if self.folder is not None and not Path(self.folder).is_dir():
            raise OptionError(
                f"OnDisk(folder) takes an existing folder for temporary files; {self.folder} is"
                " none."
            )

    def backwards(self, way: Iterable[Transition]) -> Iterator[Transition]:
        """See ``Hold``."""
        with tempfile.TemporaryDirectory(prefix="culpa-held-", dir=self.folder) as scratch:
            held: list[_Slip] = []
            files: list[Path] = []
            last: State | None = None
            for transition in way:
                slip, content = _packed(transition, last)
                files.append(Path(scratch, f"{len(files)}.safetensors"))
                save_file(content, files[-1])
                held.append(slip)
                last = transition.after

            def read() -> Tree:
                file = files.pop()
                content = load_file(file)
                file.unlink()
                return content

            yield from _unpacked(held, read)


def backward(
    run: Run, engine: Engine, start: int = 0, hold: Hold | None = None
) -> Iterator[Transition]:
    """The observed updates from the last down to ``start``, recomputed segment by segment.

    Memory: the states of the longest segment between two kept states, O(sqrt(K)) by default, or
    what ``hold`` makes of them; cost: one replay of the updates.
    """
    hold = hold or InMemory()
    bounds = [start, *(k for k in run.kept_states if start < k < run.num_steps), run.num_steps]
    for low, high in zip(reversed(bounds[:-1]), reversed(bounds[1:]), strict=True):
        yield from hold.backwards(forward(run, engine, low, high))


@dataclass(frozen=True)
class _Slip:
    """A transition without its tensors, and where these were.

    ``continues``: its state before is the state after the update before it; ``fresh``: but for the
    optimizer's slots, of which it has none.
    """

    transition: Transition
    devices: dict[str, torch.device]
    continues: bool
    fresh: bool


def _packed(transition: Transition, last: State | None) -> tuple[_Slip, Tree]:
    after, before = transition.after, transition.before
    fresh = not before.slots
    continues = last is not None and _same(before, last) and (fresh or before.slots is last.slots)
    content = {f"after/{name}": value for name, value in after.flat().items()}
    content |= {f"grads/{name}": value for name, value in transition.grads.items()}
    if not continues:
        content |= {f"before/{name}": value for name, value in before.flat().items()}
    slip = _Slip(
        replace(transition, before=State({}), after=State({}), grads={}),
        {name: value.device for name, value in content.items()},
        continues,
        fresh,
    )
    return slip, {name: value.detach().contiguous() for name, value in content.items()}


def _same(one: State, other: State) -> bool:
    """Whether parameters and buffers are the very same tensors."""
    return all(
        a.keys() == b.keys() and all(a[name] is b[name] for name in a)
        for a, b in ((one.params, other.params), (one.buffers, other.buffers))
    )


def _unpacked(held: list[_Slip], read: Callable[[], Tree]) -> Iterator[Transition]:
    """The transitions of ``held``, from the last, whose contents ``read`` gives in that order."""
    ahead = read() if held else {}
    while held:
        slip, content = held.pop(), ahead
        ahead = read() if held else {}
        parts: dict[str, Tree] = {"after": {}, "grads": {}, "before": {}}
        for name, value in content.items():
            part, _, path = name.partition("/")
            parts[part][path] = value.to(slip.devices[name])
        if slip.continues:
            parts["before"] = {
                path: value.to(held[-1].devices[name])
                for name, value in ahead.items()
                for part, _, path in [name.partition("/")]
                if part == "after" and not (slip.fresh and path.startswith("slots/"))
            }
        yield replace(
            slip.transition,
            before=State.unflatten(parts["before"]),
            after=State.unflatten(parts["after"]),
            grads=parts["grads"],
        )
