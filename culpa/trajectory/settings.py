"""What ``culpa.record`` was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from culpa.trajectory.checkpoints import CheckpointPolicy
from culpa.trajectory.durability import Durability
from culpa.trajectory.ranks.recording import Partners


@dataclass(frozen=True)
class Settings:
    """Of one recording; see ``culpa.record``."""

    policy: CheckpointPolicy
    durability: Durability
    clip_grad_norm: float | None = None
    clip_grad_value: float | None = None
    scheduler: Any = None
    """What has a state beside the optimizers: the schedulers, and the scaler."""
    scaler: Any = None
    strict: bool = False
    partners: Partners | None = None
    """The other ranks, if several processes train."""
