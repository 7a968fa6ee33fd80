"""Walking backward: recomputed updates wait, in memory or elsewhere, until their turn comes.

A segment between two kept states is executed forward and consumed from its end, so all its states
are there at once: O(sqrt(K)) of them. What that is for a large model may be more than the device,
or the machine, has; then they wait on the CPU, or on disk, or in half precision (rounded.py).
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
from culpa.trajectory import rounded
from culpa.trajectory.engine import Engine
from culpa.trajectory.run import Run
from culpa.trajectory.state import State, on_cpu
from culpa.trajectory.taken import Taker
from culpa.trajectory.walk import Transition, segment
from culpa.tree import Tree

ANCHORED = 32
"""In half precision every so many updates a state waits as it is, which bounds its error."""


GRAPHS = 2**28
"""Bytes of graphs that wait beside the states, by default."""


@runtime_checkable
class Hold(Protocol):
    """Where the updates of a segment wait."""

    @property
    def dtype(self) -> torch.dtype | None:
        """What their increments and gradients are rounded to; ``None``: they come back as is."""
        ...

    def backwards(self, way: Iterable[Transition]) -> Iterator[Transition]:
        """The updates of ``way``, each the next one's predecessor, from the last to the first."""
        ...


@dataclass(frozen=True)
class InMemory:
    """The default: where the model is. Each is let go when the next one is asked for.

    Args:
        dtype: ``torch.bfloat16`` halves what waits: gradients are rounded to it, and parameters
            and optimizer slots told from those after the update by as many bits (rounded.py), so
            that each keeps seven, and so does what the update did to it. The record stays as it is,
            and so do buffers and all that is not float32. Measured, scores were off by 1e-4 to
            5e-3 of their norm and no grade of trust changed (docs/scaling.md);
            ``Scores.strategy`` says that it was used. Other types are refused.
        graphs: so many bytes of graphs may wait as well, with exact products in ``attribute``: a
            product with the graph of the replayed update costs a third to a half less
            (dynamics/graphs.py). Where one does not fit, as with models of many activations, it is
            made again. 0: none waits. Not used with ``dtype``.
    """

    dtype: torch.dtype | None = None
    graphs: int = GRAPHS

    def __post_init__(self) -> None:
        """Check the type, and the number."""
        rounded.require(self.dtype)
        whole = isinstance(self.graphs, int)  # pyright: ignore[reportUnnecessaryIsInstance]
        if isinstance(self.graphs, bool) or not whole or self.graphs < 0:
            raise OptionError(
                f"InMemory(graphs=...) is a number of bytes, 0 or more; got {self.graphs!r}."
            )

    def backwards(self, way: Iterable[Transition]) -> Iterator[Transition]:
        """See ``Hold``."""
        if self.dtype is None:
            held = list(way)
            while held:
                yield held.pop()
            return
        contents: list[Tree] = []
        slips = _pack(way, self.dtype, contents.append)
        yield from _unpacked(slips, contents.pop)


@dataclass(frozen=True)
class OnCpu:
    """In the machine's memory, for models on an accelerator. Their batches stay where they are.

    Cost: one transfer of a state and a gradient there and back for every update.

    Args:
        dtype: ``torch.bfloat16`` halves what waits; see ``culpa.InMemory``.
    """

    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        """Check the type."""
        rounded.require(self.dtype)

    def backwards(self, way: Iterable[Transition]) -> Iterator[Transition]:
        """See ``Hold``."""
        contents: list[Tree] = []

        def keep(content: Tree) -> None:
            contents.append(on_cpu(content))

        slips = _pack(way, self.dtype, keep)
        yield from _unpacked(slips, contents.pop)


@dataclass(frozen=True)
class OnDisk:
    """In temporary files, for states of which memory does not hold many.

    Memory: about three states and two gradients, however long the segment; batches besides. Cost:
    one state and one gradient written and read for every update. The files are removed as they are
    used, and all of them if the sweep ends early.

    Args:
        folder: an existing one, on a disk with room for the states of a segment (``culpa.forecast``
            tells how much); ``None``: the system's temporary folder.
        dtype: ``torch.bfloat16`` halves what waits; see ``culpa.InMemory``.
    """

    folder: str | Path | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        """Check the folder and the type."""
        rounded.require(self.dtype)
        if self.folder is not None and not Path(self.folder).is_dir():
            raise OptionError(
                f"OnDisk(folder) takes an existing folder for temporary files; {self.folder} is"
                " none."
            )

    def backwards(self, way: Iterable[Transition]) -> Iterator[Transition]:
        """See ``Hold``."""
        with tempfile.TemporaryDirectory(prefix="culpa-held-", dir=self.folder) as scratch:
            files: list[Path] = []

            def keep(content: Tree) -> None:
                files.append(Path(scratch, f"{len(files)}.safetensors"))
                save_file(on_cpu(content), files[-1])

            def read() -> Tree:
                file = files.pop()
                content = load_file(file)
                file.unlink()
                return content

            slips = _pack(way, self.dtype, keep)
            yield from _unpacked(slips, read)


def backward(
    run: Run,
    engine: Engine,
    start: int = 0,
    hold: Hold | None = None,
    taker: Taker | None = None,
) -> Iterator[Transition]:
    """The observed updates from the last down to ``start``, recomputed segment by segment.

    Memory: the states of the longest segment between two kept states, O(sqrt(K)) by default, or
    what ``hold`` makes of them, and what ``taker`` keeps; cost: one replay of the updates.
    """
    hold = hold or InMemory()
    bounds = [start, *(k for k in run.kept_states if start < k < run.num_steps), run.num_steps]
    for low, high in zip(reversed(bounds[:-1]), reversed(bounds[1:]), strict=True):
        yield from hold.backwards(segment(run, engine, low, high, taker))


@dataclass(frozen=True)
class _Slip:
    """A transition without its tensors, and where these were, by their path in the state.

    ``grads``: where each was, and of which type.
    """

    transition: Transition
    before: dict[str, torch.device]
    after: dict[str, torch.device]
    grads: dict[str, tuple[torch.device, torch.dtype]]


def _pack(
    way: Iterable[Transition], dtype: torch.dtype | None, keep: Callable[[Tree], None]
) -> list[_Slip]:
    """Let every transition wait: its tensors go to ``keep``, what comes back is the rest of it.

    An update keeps its gradients, the state before it (``before/...``, or by how much it changed)
    and of the state after the update before it what is not the same (``left/...``). The state after
    the last one is kept at the end.
    """
    slips: list[_Slip] = []
    last: Tree = {}
    for transition in way:
        anchor = dtype is not None and len(slips) % ANCHORED == 0
        slips.append(_slip(transition, dtype is not None))
        keep(_content(transition, last, anchor, dtype is not None))
        last = transition.after.flat()
        del transition  # the next one takes as much memory
    if slips:
        keep(_plain({f"left/{path}": value for path, value in last.items()}))
    return slips


def _slip(transition: Transition, rounding: bool) -> _Slip:
    states = (transition.before, transition.after)
    before, after = ({p: v.device for p, v in state.flat().items()} for state in states)
    grads = {name: (value.device, value.dtype) for name, value in transition.grads.items()}
    bare = replace(
        transition, before=State({}), after=State({}), grads={}, rounded=rounding, graph=None
    )
    return _Slip(bare, before, after, grads)


def _content(transition: Transition, last: Tree, anchor: bool, rounding: bool) -> Tree:
    """What ``_pack`` keeps of a transition; ``last``: the state after the one before it."""
    before, after = transition.before.flat(), transition.after.flat()
    grads = rounded.gradients(transition.grads) if rounding else transition.grads
    content = {f"grads/{name}": value for name, value in grads.items()}
    content |= _before(before, after, rounding)
    anchored = {p for p in before if anchor and f"told/{p}" in content}
    content |= {
        f"left/{path}": value
        for path, value in last.items()
        if path in anchored or before.get(path) is not value
    }
    return _plain(content)


def _plain(content: Tree) -> Tree:
    return {name: value.detach().contiguous() for name, value in content.items()}


def _before(before: Tree, after: Tree, rounding: bool) -> Tree:
    """A state, or what tells it from the one after it."""
    content: Tree = {}
    for path, value in before.items():
        if rounding and path in after and rounded.rounds(value) and not path.startswith("buffers/"):
            content[f"told/{path}"] = rounded.told_from(after[path], value)
        else:
            content[f"before/{path}"] = value
    return content


def _unpacked(held: list[_Slip], read: Callable[[], Tree]) -> Iterator[Transition]:
    """The transitions of ``held``, from the last; ``read`` gives what waited in that order."""
    later = read() if held else {}
    before: Tree = {}
    while held:
        slip, content = held.pop(), read()
        after = {
            path: later[f"left/{path}"].to(device) if f"left/{path}" in later else before[path]
            for path, device in slip.after.items()
        }
        before = {p: _told(content, p, device, after) for p, device in slip.before.items()}
        grads = {
            name: content[f"grads/{name}"].to(device, dtype)
            for name, (device, dtype) in slip.grads.items()
        }
        later = {name: value for name, value in content.items() if name.startswith("left/")}
        ends = State.unflatten(after)
        del content, after
        yield replace(slip.transition, before=State.unflatten(before), after=ends, grads=grads)


def _told(content: Tree, path: str, device: torch.device, after: Tree) -> torch.Tensor:
    """A tensor of the state before, by what waited of it and the state after."""
    if f"before/{path}" in content:
        return content[f"before/{path}"].to(device)
    return rounded.before(after[path], content[f"told/{path}"].to(device))


def told(hold: Hold | None) -> str:
    """For the user to read: what was lost by waiting; empty where nothing was."""
    if hold is None or hold.dtype is None:
        return ""
    return "; states and gradients of waiting updates rounded to bfloat16"
