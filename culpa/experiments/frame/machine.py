"""What a caption says of the machine: its kind, never its name."""

from __future__ import annotations

import os
import platform

import torch


def machine() -> str:
    """Such as ``"x86_64, 2 cores, 1 thread, torch 2.13.0"``."""
    cores, threads = os.cpu_count() or 1, torch.get_num_threads()
    parts = [
        platform.machine(),
        f"{cores} core{'s' * (cores != 1)}",
        f"{threads} thread{'s' * (threads != 1)}",
        f"torch {str(torch.__version__).partition('+')[0]}",
    ]
    return ", ".join(parts)
