"""Memory that the next update needs again, kept from going back to the system in between.

A product frees its graph at the end of every update, and glibc then returns what lies at the top of
the heap: the next product has it back page by page, a page fault each. That was a tenth of a sweep
with a small GPT-2 and a ResNet-8. How much stays is twice the largest block that a program has ever
freed, as far as that was no more than 32 MB (mallopt(3), M_MMAP_THRESHOLD): so one is freed.
"""

from __future__ import annotations

import torch

LARGEST = 2**25 - 2**16
"""Bytes just below glibc's bound (DEFAULT_MMAP_THRESHOLD_MAX on 64 bits), header and alignment in
it."""


def keep_freed() -> None:
    """Let the process keep up to 64 MB that it has freed, for as long as it lives.

    Nothing is touched, so nothing is used: a few microseconds. It is what happens to any program
    that frees a tensor of that size; other allocators take no notice.
    """
    torch.empty(LARGEST, dtype=torch.uint8, device="cpu")
