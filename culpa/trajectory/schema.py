"""The records a run folder is made of, as typed structures (the format is docs/format.md)."""

from __future__ import annotations

from typing import Any

import msgspec

FORMAT = 1
"""Version of the run folder; a reader refuses any other."""


class Stage(msgspec.Struct, frozen=True):
    """A named stage of training: the updates ``[start, stop)``."""

    name: str
    start: int
    stop: int

    def __len__(self) -> int:
        """The number of updates."""
        return self.stop - self.start

    @property
    def updates(self) -> range:
        """The indices of its updates."""
        return range(self.start, self.stop)


class Group(msgspec.Struct, frozen=True):
    """One parameter group at one update: the names it holds and its hyperparameters."""

    names: tuple[str, ...]
    hyper: dict[str, Any]


class OptimizerSpec(msgspec.Struct, frozen=True):
    """Which optimizer made an update, by torch class name, and which parameters it held."""

    name: str
    groups: tuple[tuple[str, ...], ...]


class MicroBatch(msgspec.Struct, frozen=True):
    """One micro-batch of an update: its layout, its rows, and the generators before its forward.

    ``random`` is ``None`` where the generators stood as the computation before had left them.
    """

    layout: int
    rows: tuple[int, ...]
    random: int | None
    placements: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """Of every tensor in memory (batches.py), unless all were contiguous and aligned."""


class StepRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One applied update: everything needed to execute it again, and what came out."""

    index: int
    optimizer: OptimizerSpec
    hypers: tuple[dict[str, Any], ...]
    """One dictionary per parameter group."""
    micro_batches: tuple[MicroBatch, ...]
    weights: tuple[float, ...] | None
    """``None``: each micro-batch's loss was divided by their number."""
    clip_grad_norm: float | None
    reset: bool
    """The optimizer started fresh at this update (a new one, or its state was cleared)."""
    drew_randomness: bool
    evaluating: tuple[str, ...]
    """Names of submodules that were in evaluation mode."""
    without_gradient: tuple[str, ...]
    """Held parameters whose ``.grad`` was ``None`` when the optimizer stepped."""
    digest: bytes
    """Of parameters and buffers after the update (trajectory/digest.py)."""
    fingerprints: bytes
    """The first four bytes of each tensor's digest, in the order of names: they name a culprit."""

    @property
    def groups(self) -> tuple[Group, ...]:
        """The parameter groups with their hyperparameters at this update."""
        return tuple(
            Group(names, hyper)
            for names, hyper in zip(self.optimizer.groups, self.hypers, strict=True)
        )

    @property
    def held(self) -> tuple[str, ...]:
        """The names of all parameters the optimizer held."""
        return tuple(name for names in self.optimizer.groups for name in names)


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """``culpa.json``: what the folder is, written last of all."""

    format: int = FORMAT
    culpa_version: str
    created: str
    status: str
    """"recording" (also after a crash), "interrupted", "truncated" or "complete"."""
    environment: dict[str, str]
    parameters: dict[str, str]
    """Name -> dtype and shape, as ``"float32 [128, 64]"``, of every parameter of the model."""
    buffers: dict[str, str]
    frozen: tuple[str, ...]
    """Parameters that no optimizer held: kept once."""
    num_steps: int = 0
    root_digest: str = ""
    """Hexadecimal; of a complete run only."""
    reason: str = ""
    """Why a run is interrupted or truncated."""
    plain_seconds: float = 0.0
    """Wall time of the updates themselves, for forecasts."""
