"""What bitwise replay depends on, captured as strings and compared field by field."""

from __future__ import annotations

import platform
from collections.abc import Generator
from contextlib import contextmanager

import numpy as np
import torch


def capture() -> dict[str, str]:
    """The facts of this process that can change the bits of a training step."""
    facts = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "deterministic algorithms": str(torch.are_deterministic_algorithms_enabled()),
        "matmul precision": torch.get_float32_matmul_precision(),
        "default dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "mkldnn": str(torch.backends.mkldnn.is_available()),
        "flash attention": str(torch.backends.cuda.flash_sdp_enabled()),
    }
    if torch.cuda.is_available():
        facts["device"] = torch.cuda.get_device_name()
        facts["cuda"] = str(torch.version.cuda)
        facts["cudnn benchmark"] = str(torch.backends.cudnn.benchmark)
    return facts


def differences(recorded: dict[str, str], here: dict[str, str]) -> list[str]:
    """One line for each fact that differs: ``threads: recorded 2, here 1``."""
    return [
        f"{name}: recorded {recorded.get(name, 'nothing')}, here {here.get(name, 'nothing')}"
        for name in sorted(recorded.keys() | here.keys())
        if recorded.get(name) != here.get(name)
    ]


@contextmanager
def as_recorded(recorded: dict[str, str]) -> Generator[None]:
    """Set what can be set in a running process (threads, determinism, precision); restore after."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_num_threads(int(recorded.get("threads", threads)))
        torch.use_deterministic_algorithms(
            recorded.get("deterministic algorithms", str(deterministic)) == "True"
        )
        torch.set_float32_matmul_precision(recorded.get("matmul precision", precision))
        yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.set_float32_matmul_precision(precision)
