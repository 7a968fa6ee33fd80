"""The facts of a process that can change the bits of a training step, one field each.

docs/environment.md gives the reason of every field. A field says how to read it, how to set it if a
running process can, and on which devices it matters: a difference elsewhere is reported only.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

EVERYWHERE, CUDA, NOWHERE = "everywhere", "cuda", "nowhere"
MOST_THREADS = 1024
"""A folder that asks for more is not to be believed."""

VARIABLES: Mapping[str, str] = {
    "ATEN_CPU_CAPABILITY": EVERYWHERE,
    "MKL_CBWR": EVERYWHERE,
    "MKL_DYNAMIC": EVERYWHERE,
    "MKL_ENABLE_INSTRUCTIONS": EVERYWHERE,
    "OMP_DYNAMIC": EVERYWHERE,
    "OMP_THREAD_LIMIT": EVERYWHERE,
    "ONEDNN_MAX_CPU_ISA": EVERYWHERE,
    "ONEDNN_DEFAULT_FPMATH_MODE": EVERYWHERE,
    "CUBLAS_WORKSPACE_CONFIG": CUDA,
    "CUBLASLT_WORKSPACE_SIZE": CUDA,
    "NVIDIA_TF32_OVERRIDE": CUDA,
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": CUDA,
    # What these decide is in the field "threads", which is read when it has taken effect.
    "OMP_NUM_THREADS": NOWHERE,
    "MKL_NUM_THREADS": NOWHERE,
    # Orders sets of strings; a process that left it unset drew one that nobody can set again.
    "PYTHONHASHSEED": NOWHERE,
}
"""Environment variables that libraries read while they are loaded, and where they matter. They are
recorded as ``$NAME`` if they are set. ``culpa.cli.early`` sets them before torch is loaded."""


@dataclass(frozen=True)
class Field:
    """One fact: ``read`` it; ``write`` sets it, if a running process can."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], None] | None = None
    matters: str = EVERYWHERE
    choices: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What a recorded text may be, and the value to write for it."""

    def text(self) -> str:
        """As it stands in the record."""
        value = self.read()
        if value == "none":  # a precision that nobody asked for is IEEE float32
            return "ieee"
        named = (name for name, choice in self.choices.items() if choice == value)
        return next(named, str(value))

    def value(self, text: str) -> Any:
        """What to write for a recorded text; raises ``ValueError`` if it is none of the choices."""
        if self.name == "threads":
            if not re.fullmatch(r"[0-9]{1,4}", text) or not 1 <= int(text) <= MOST_THREADS:
                raise ValueError(text)
            return int(text)
        if text not in self.choices:
            raise ValueError(text)
        return self.choices[text]


_SWITCH = {"False": False, "True": True}
_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def _flag(
    name: str, owner: Any, attribute: str, matters: str, choices: Mapping[str, Any] = _SWITCH
) -> Field:
    """A setting that torch offers as an attribute."""

    def write(value: Any) -> None:
        setattr(owner, attribute, value)

    return Field(name, lambda: getattr(owner, attribute), write, matters, choices)


def _precision(name: str, owner: Any, matters: str) -> Field:
    """What float32 products may be computed in."""
    choices = {"ieee": "ieee", "tf32": "tf32", "bf16": "bf16"}
    return _flag(name, owner, "fp32_precision", matters, choices)


def _set_determinism(value: str) -> None:
    torch.use_deterministic_algorithms(value != "False", warn_only=value == "warn only")


def _determinism() -> str:
    if not torch.are_deterministic_algorithms_enabled():
        return "False"
    return "warn only" if torch.is_deterministic_algorithms_warn_only_enabled() else "True"


def _set_flush(value: bool) -> None:
    torch.set_flush_denormal(value)


def _flushes_denormals() -> bool:
    """torch tells nobody; the smallest numbers do."""
    return float(torch.tensor([1e-40], dtype=torch.float32) * 1.0) == 0.0


def _autocast() -> str:
    on = [d for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]
    return ", ".join(f"{d} {_dtype(torch.get_autocast_dtype(d))}" for d in on) or "off"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cpu() -> str:
    """The processor's model: MKL and oneDNN choose kernels and blocking by it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _built_with(pattern: str) -> str:
    found = re.search(pattern, torch.__config__.show())
    return " ".join(found.groups()) if found else "none"


_SAME: Mapping[str, Any] = {name: name for name in ("False", "True", "warn only")}
_B: Any = torch.backends

FIELDS: tuple[Field, ...] = (
    Field("python", platform.python_version),
    Field("torch", lambda: torch.__version__),
    Field("numpy", lambda: np.__version__),
    Field("blas", lambda: _built_with(r"(Math Kernel Library) Version (\S+?)-")),
    Field("onednn", lambda: _built_with(r"MKL-DNN (v\S+)")),
    Field("machine", platform.machine),
    Field("system", platform.system),
    Field("cpu", _cpu),
    Field("cpu capability", torch.backends.cpu.get_cpu_capability),
    Field("threads", torch.get_num_threads, torch.set_num_threads),
    Field("interop threads", torch.get_num_interop_threads, matters=NOWHERE),
    Field("deterministic algorithms", _determinism, _set_determinism, choices=_SAME),
    Field("default dtype", torch.get_default_dtype, torch.set_default_dtype, choices=_DTYPES),
    Field("flush denormal", _flushes_denormals, _set_flush, choices=_SWITCH),
    Field("autocast", _autocast),
    _flag("mkldnn", _B.mkldnn, "enabled", EVERYWHERE),
    _flag("mkldnn deterministic", _B.mkldnn, "deterministic", EVERYWHERE),
    _precision("matmul precision", _B.mkldnn.matmul, EVERYWHERE),
    _precision("convolution precision", _B.mkldnn.conv, EVERYWHERE),
    _precision("recurrence precision", _B.mkldnn.rnn, EVERYWHERE),
    Field(
        "flash attention",
        _B.cuda.flash_sdp_enabled,
        _B.cuda.enable_flash_sdp,
        choices=_SWITCH,
    ),
    Field("math attention", _B.cuda.math_sdp_enabled, _B.cuda.enable_math_sdp, choices=_SWITCH),
    Field(
        "efficient attention",
        _B.cuda.mem_efficient_sdp_enabled,
        _B.cuda.enable_mem_efficient_sdp,
        CUDA,
        _SWITCH,
    ),
    Field("cudnn attention", _B.cuda.cudnn_sdp_enabled, _B.cuda.enable_cudnn_sdp, CUDA, _SWITCH),
    Field(
        "attention fast path",
        _B.mha.get_fastpath_enabled,
        _B.mha.set_fastpath_enabled,
        choices=_SWITCH,
    ),
    _flag("cudnn", _B.cudnn, "enabled", CUDA),
    _flag("cudnn benchmark", _B.cudnn, "benchmark", CUDA),
    _flag("cudnn deterministic", _B.cudnn, "deterministic", CUDA),
    _precision("cuda matmul precision", _B.cuda.matmul, CUDA),
    _precision("cudnn convolution precision", _B.cudnn.conv, CUDA),
    _precision("cudnn recurrence precision", _B.cudnn.rnn, CUDA),
)
"""In the order in which they are set."""

NAMES = frozenset(f.name for f in FIELDS)


def devices(tensors: Iterable[Tensor]) -> dict[str, str]:
    """What a model lives on: ``cpu`` if it has no tensors."""
    kinds = sorted({t.device.type for t in tensors}) or ["cpu"]
    facts = {"device": ", ".join(kinds)}
    if "cuda" in kinds:
        places = sorted({str(t.device.index or 0) for t in tensors if t.device.type == "cuda"})
        facts["gpu"] = ", ".join(torch.cuda.get_device_name(int(i)) for i in places)
        facts["cuda"] = str(torch.version.cuda)
        facts["cudnn version"] = str(_B.cudnn.version())
    return facts


def variables() -> dict[str, str]:
    """The environment variables that are set, as ``$NAME``."""
    return {f"${name}": os.environ[name] for name in VARIABLES if name in os.environ}


def matters(name: str, device: str) -> bool:
    """Whether a difference in this field can change the bits of a run on ``device``."""
    if name.startswith("$"):
        where = VARIABLES.get(name[1:], EVERYWHERE)
    else:
        where = next((f.matters for f in FIELDS if f.name == name), EVERYWHERE)
    return where == EVERYWHERE or (where == CUDA and "cuda" in device)
