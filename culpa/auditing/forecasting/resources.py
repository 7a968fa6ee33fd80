"""What a process takes of memory and disk, and what there is; as the operating system tells."""

from __future__ import annotations

import ctypes
import gc
import re
import shutil
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from culpa.trajectory.source import physical_memory

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
MACHINE = Path("/proc/meminfo")
LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)
"""Of the container: limit and use, by the second version of control groups and by the first."""


@dataclass
class Peak:
    """The most that was held at once, in bytes: by the process, and of CUDA devices by tensors.

    ``process`` is 0 where the system does not tell (anything but Linux).
    """

    process: int = 0
    device: int = 0


@contextmanager
def peak() -> Generator[Peak]:
    """Measure what is done inside.

    Memory that was freed before is first given back, since what the allocator still holds would
    hide as much of the growth.
    """
    found, cuda = Peak(), torch.cuda.is_available()
    give_back()
    with suppress(OSError):
        RESET.write_text("5")  # the peak starts again from here
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    try:
        yield found
    finally:
        found.process = _field(STATUS, "VmHWM")
        found.device = torch.cuda.max_memory_allocated() if cuda else 0


def give_back() -> None:
    """Return freed memory to the system, as far as the C library can."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # a C library without it
            ctypes.CDLL(None).malloc_trim(0)


def resident() -> int:
    """Bytes of memory that the process holds now; 0 where the system does not tell."""
    return _field(STATUS, "VmRSS")


def memory_left() -> int:
    """Bytes of memory that this process can still take, of the machine's or its container's."""
    free = _field(MACHINE, "MemAvailable") or physical_memory()
    for limit, used in LIMITS:
        with suppress(OSError, ValueError):  # no such group, or "max"
            free = min(free, int(limit.read_text()) - int(used.read_text()))
    return max(0, free)


def device_memory_left() -> int:
    """Bytes that tensors can still take on the current CUDA device; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(torch.cuda.mem_get_info()[0]) + held


def disk_left(folder: Path) -> int:
    """Bytes that can still be written where ``folder`` is, or will be."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def _field(file: Path, name: str) -> int:
    try:
        match = re.search(rf"^{name}:\s+(\d+) kB", file.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0
