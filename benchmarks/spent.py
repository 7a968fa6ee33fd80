"""How the benchmarks measure: processor time, undisturbed time, and peaks of resident memory."""

from __future__ import annotations

import ctypes
import gc
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SCHEDULER = Path("/proc/thread-self/schedstat")


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor time of all threads and of processes that have ended, and what ``work`` returns."""
    began = _processor_time()
    made = work()
    return _processor_time() - began, made


def _processor_time() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)  # recording may write in one
    return time.process_time() + children.ru_utime + children.ru_stime


def undisturbed(work: Callable[[], Any]) -> tuple[float, Any]:
    """What ``work`` would take on an idle machine, and what it returns.

    The calling thread's elapsed time, less what it waited for a processor while others had them:
    sleeping, and waiting for a disk or another thread, count. Where the system does not tell
    (anywhere but on Linux), the thread's processor time.
    """
    if not SCHEDULER.exists():
        began = time.thread_time()
        made = work()
        return time.thread_time() - began, made
    queued, began = _queued(), time.perf_counter()
    made = work()
    return time.perf_counter() - began - (_queued() - queued), made


def _queued() -> float:
    """Seconds that this thread has been ready to run, and did not."""
    return int(SCHEDULER.read_text(encoding="ascii").split()[1]) / 1e9


def peak(work: Callable[[], Any]) -> int:
    """Bytes by which ``work`` raises resident memory above what is held before it; Linux only.

    Of this process alone, and to be asked once in it: what an allocator keeps of one measurement
    hides the next.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    RESET.write_text("5", encoding="ascii")  # the peak starts anew
    work()
    return max(resident("VmHWM") - before, 0)


def resident(what: str) -> int:
    """Bytes of an entry of the process's status: ``"VmRSS"``, or ``"VmHWM"``, the peak."""
    lines = STATUS.read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))
