"""``culpa.from_checkpoints``: what there is to know of a run that nobody recorded."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor

from culpa.dynamics.krylov import Updates
from culpa.errors import OptionError, StageError, StoreError, UnsupportedError
from culpa.trajectory import digest
from culpa.trajectory.schema import Stage
from culpa.tree import Tree

INSTEAD = (
    "Record such a run with culpa.record: culpa.embed and culpa.replay then follow each update"
)
"""What to do where checkpoints are not enough."""


@dataclass(frozen=True, eq=False)
class CheckpointStage:
    """One stage of a run of which only the checkpoints before and after it are known.

    Args:
        name: what the stage is called.
        data: what it was trained on: one batch (a tensor, or a tuple or dict of tensors with one
            row an example), or an iterable of batches (a list, a ``DataLoader``). Only
            ``Krylov(examples=...)`` rows of it are ever used: a fair sample is enough. The loss
            must be a mean over rows.
        steps: its number of updates.
        learning_rate: of every update, or a sequence of one rate per update.
        momentum, weight_decay, nesterov: as in ``torch.optim.SGD``.
        fresh_optimizer: whether the stage began with a new optimizer (each stage its own job).
            ``False``: the momentum of the stage before went on; it is not in a checkpoint of the
            model and is estimated from the gradient near the boundary.
        optimizer: the class in ``torch.optim``; ``"SGD"`` only.

    Raises:
        OptionError: for numbers outside of what they mean.
        UnsupportedError: for another optimizer.
    """

    name: str
    data: Any = field(repr=False)
    steps: int = field(kw_only=True)
    learning_rate: float | Sequence[float] = field(kw_only=True)
    momentum: float = field(default=0.0, kw_only=True)
    weight_decay: float = field(default=0.0, kw_only=True)
    nesterov: bool = field(default=False, kw_only=True)
    fresh_optimizer: bool = field(default=True, kw_only=True)
    optimizer: str = field(default="SGD", kw_only=True)

    def __post_init__(self) -> None:
        """Check all that can be checked without the data."""
        what = f"CheckpointStage({self.name!r}"
        if not self.name:
            raise OptionError("CheckpointStage(name=...) must not be empty: tables show it.")
        if _is_empty(self.data):
            raise _no_data(self.name)
        if self.optimizer != "SGD":
            raise UnsupportedError(
                f"{what}, optimizer={self.optimizer!r}): between two checkpoints only SGD can be"
                " followed, with momentum, Nesterov's or none; the state of adaptive optimizers"
                f" depends on every gradient. {INSTEAD}, with {self.optimizer} too."
            )
        if isinstance(self.steps, bool) or self.steps < 1:
            raise OptionError(
                f"{what}, steps={self.steps!r}): a stage has at least one update. Leave out a"
                " stage that made none, with its checkpoint."
            )
        if len(self.rates) != self.steps:
            raise OptionError(
                f"{what}, learning_rate=...) gives {len(self.rates)} rates for {self.steps}"
                " updates. Give one number, or one rate per update."
            )
        for name, value, most in (
            *(("learning_rate", rate, math.inf) for rate in self.rates),
            ("momentum", self.momentum, 1.0),
            ("weight_decay", self.weight_decay, math.inf),
        ):
            if not 0.0 <= value < most:
                limit = "finite" if most == math.inf else f"below {most:g}"
                raise OptionError(f"{what}, {name}={value!r}): must be at least 0 and {limit}.")
        if self.nesterov and self.momentum == 0.0:
            raise OptionError(f"{what}, nesterov=True) needs a momentum above 0, as in torch.")

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rate of every update."""
        if isinstance(self.learning_rate, (int, float)):
            return (float(self.learning_rate),) * self.steps
        return tuple(float(rate) for rate in self.learning_rate)

    @property
    def updates(self) -> Updates:
        """Its updates as mathematics."""
        return Updates(self.rates, self.momentum, self.weight_decay, self.nesterov)


class CheckpointRun:
    """A run known by its N + 1 stage-boundary checkpoints. Made by ``culpa.from_checkpoints``.

    Attributes:
        stages: ``Stage(name, start, stop)``, updates ``[start, stop)``, in order of time.
        num_steps: the number of updates.
        described: what was said of each stage.
    """

    def __init__(
        self, checkpoints: Sequence[Path | Tree], described: Sequence[CheckpointStage]
    ) -> None:
        self.described = tuple(described)
        stops = torch.tensor([0, *(one.steps for one in described)]).cumsum(0).tolist()
        self.stages = tuple(
            Stage(one.name, start, stop)
            for one, start, stop in zip(described, stops[:-1], stops[1:], strict=True)
        )
        self.num_steps: int = stops[-1]
        self._checkpoints = tuple(checkpoints)
        self._batches: dict[int, tuple[Any, ...]] = {}

    def __repr__(self) -> str:
        stages = ", ".join(f"{s.name} [{s.start}, {s.stop})" for s in self.stages)
        return f"CheckpointRun({self.num_steps} updates: {stages})"

    @property
    def root_digest(self) -> str:
        """Of all tensors of all checkpoints: what to quote of this run."""
        found = [
            digest.combine(digest.tensor_digests(self.checkpoint(at)))
            for at in range(len(self._checkpoints))
        ]
        return digest.combine(found).hex()

    def stage(self, name: str) -> Stage:
        """The stage by that name; raises ``StageError`` listing those that exist."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        known = ", ".join(repr(s.name) for s in self.stages)
        raise StageError(f"no stage {name!r} in these checkpoints; the stages are {known}.")

    def checkpoint(self, at: int) -> Tree:
        """All tensors after ``at`` stages (0: before training), read anew if they are in a file."""
        held = self._checkpoints[at]
        return _read(held) if isinstance(held, Path) else held

    def final_state(self) -> Tree:
        """All tensors after the last stage, by name.

        Buffers too: a state dict does not tell them from parameters, and the model loads both.
        """
        return self.checkpoint(len(self.stages))

    def final_buffers(self) -> Tree:
        """Nothing: the buffers are in ``final_state`` (see there)."""
        return {}

    def batches(self, at: int) -> tuple[Any, ...]:
        """The batches of the data of one stage, read once."""
        if at not in self._batches:
            self._batches[at] = _batches(self.described[at])
        return self._batches[at]


def from_checkpoints(
    checkpoints: str | Path | Sequence[str | Path | Mapping[str, Any]],
    stages: Iterable[CheckpointStage],
) -> CheckpointRun:
    """A run from the checkpoints of the model between its stages, without a recording.

    Args:
        checkpoints: N + 1 of them for N stages, the first from before training: state dicts or
            safetensors files; or a folder of safetensors files, taken in the order of their names
            (numbers in them by value).
        stages: what is known of the N stages, in order of time.

    Returns:
        A run for ``culpa.embed(run, problem, propagator=culpa.Krylov(rank))``. There is nothing in
        it to replay.

    Raises:
        StageError: no stage, or two of one name.
        StoreError: another number of checkpoints, files that are no safetensors, or checkpoints
            that do not hold the same tensors.
    """
    described = tuple(stages)
    names = [stage.name for stage in described]
    if not names:
        raise StageError("from_checkpoints needs at least one CheckpointStage, got none.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise StageError(f"stage names must differ, and {', '.join(map(repr, twice))} comes twice.")
    held = _held(checkpoints)
    if len(held) != len(described) + 1:
        raise StoreError(
            f"{len(described)} stages need {len(described) + 1} checkpoints, from before the first"
            f" stage to after the last; got {len(held)}"
            + (f" in {checkpoints}." if isinstance(checkpoints, (str, Path)) else ".")
        )
    run = CheckpointRun(held, described)
    first = _shapes(run.checkpoint(0))
    for at in range(1, len(held)):
        here = _shapes(run.checkpoint(at))
        wrong = sorted(n for n in first.keys() | here.keys() if first.get(n) != here.get(n))
        if wrong:
            name = wrong[0]
            raise StoreError(
                f"checkpoint {at} does not fit checkpoint 0: {name!r} is"
                f" {here.get(name, 'missing')} in it and {first.get(name, 'missing')} there"
                f" ({len(wrong)} such tensors). All must be state dicts of one model."
            )
    return run


def _held(
    checkpoints: str | Path | Sequence[str | Path | Mapping[str, Any]],
) -> list[Path | Tree]:
    """Files as paths, state dicts as copies."""
    if isinstance(checkpoints, (str, Path)):
        folder = Path(checkpoints)
        if not folder.is_dir():
            raise StoreError(
                f"{folder} is no folder of checkpoints. Give a folder of safetensors files, or the"
                " checkpoints themselves as a list of state dicts or files."
            )
        return [*sorted(folder.glob("*.safetensors"), key=_natural)]
    copied: list[Path | Tree] = []
    for at, one in enumerate(checkpoints):
        if isinstance(one, (str, Path)):
            copied.append(Path(one))
            continue
        wrong = [name for name, value in one.items() if not isinstance(value, Tensor)]
        if wrong:
            raise StoreError(
                f"checkpoint {at} holds {wrong[0]!r}, which is no tensor. Give model.state_dict()"
                " itself, not a dictionary around it."
            )
        copied.append({name: value.detach().clone() for name, value in one.items()})
    return copied


def _natural(path: Path) -> list[tuple[int, str]]:
    """A sorting key by which ``step9`` comes before ``step10``."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _read(path: Path) -> Tree:
    try:
        return load_file(path)
    except Exception as error:
        raise StoreError(
            f"{path} cannot be read as safetensors: {error}. Pickled checkpoints (.pt, .bin) are"
            " never opened here: load them with torch.load(..., weights_only=True) and pass the"
            " state dicts."
        ) from error


def _shapes(tensors: Tree) -> dict[str, str]:
    return {name: f"{value.dtype} {list(value.shape)}" for name, value in tensors.items()}


def _batches(stage: CheckpointStage) -> tuple[Any, ...]:
    """A tensor, a tuple and a dict are one batch; anything else is an iterable of batches."""
    one = isinstance(stage.data, (Tensor, Mapping, tuple))
    found: tuple[Any, ...] = (stage.data,) if one else tuple(stage.data)
    if not found:
        raise _no_data(stage.name)
    return found


def _is_empty(data: Any) -> bool:
    """Whether it can be told without reading an iterable that there is nothing in it."""
    leaves: list[Any] | None = None
    if isinstance(data, Tensor):
        leaves = [data]
    elif isinstance(data, Mapping):
        leaves = list(cast("Mapping[Any, Any]", data).values())
    elif isinstance(data, (list, tuple)):
        leaves = list(cast("Sequence[Any]", data))
    if leaves is None:
        return False
    return not leaves or any(isinstance(leaf, Tensor) and leaf.numel() == 0 for leaf in leaves)


def _no_data(name: str) -> OptionError:
    return OptionError(
        f"the data of stage {name!r} are empty. Its curvature is measured on them: give one batch"
        " of tensors, or an iterable of batches that can be read at any time."
    )
