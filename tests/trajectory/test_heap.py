"""What a walk frees at the end of an update is there for the next one."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, torch
from culpa.trajectory.heap import keep_freed

def faults():
    began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):  # as the graph of a product: many blocks, none of them large
        made = [torch.ones(50_000) for _ in range(100)]
        del made
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - began

before = faults()
keep_freed()
faults()
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_memory_that_was_freed_is_not_faulted_in_again() -> None:
    found = subprocess.check_output([sys.executable, "-c", SCRIPT], text=True)
    before, after = map(int, found.split())
    assert before > 5_000
    assert after < before / 10
