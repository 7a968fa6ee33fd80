"""What one job takes, as plain numbers."""

from __future__ import annotations

import msgspec


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What one job takes.

    Attributes:
        seconds: until it is done.
        memory: bytes that the whole process will hold at its peak; each, if there are several.
        more: what all of them will hold that this one did not when the forecast was made.
        device_memory: bytes of tensors on CUDA devices at the peak; 0 without one.
        disk: bytes that it writes: a record to stay, waiting updates of ``attribute`` for a while.
        at_most: whether it may end earlier, as an audit does whose ranking is settled.
        processes: that share the job; ``seconds`` are those of one alone.
    """

    seconds: float
    memory: int
    more: int
    device_memory: int = 0
    disk: int = 0
    at_most: bool = False
    processes: int = 1


class Jobs(msgspec.Struct, frozen=True, kw_only=True):
    """The jobs that are possible, by name, and why others are not.

    ``updates`` of the run, each of which takes ``update_seconds`` of training or replay.
    """

    jobs: dict[str, Job]
    refused: dict[str, str]
    updates: int
    update_seconds: float
