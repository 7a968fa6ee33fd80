"""A ``transformers.Trainer`` on several processes: what is recorded of it, and what is refused."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from culpa.errors import UnsupportedError
from culpa.integrations.attributes import replaced

DATA_PARALLEL = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_XPU")
"""Accelerate's names of one process, and of several with DistributedDataParallel."""


def require_data_parallel(trainer: Trainer) -> None:
    """Raise unless one process trains, or several do that each have the whole model.

    Raises:
        UnsupportedError: for a trainer that spreads its model over processes.
    """
    args, kind = trainer.args, trainer.accelerator.distributed_type.name
    if args.n_gpu > 1:
        raise UnsupportedError(
            f"the trainer spreads each batch over {args.n_gpu} devices of one process"
            " (DataParallel). Start a process for each: torchrun --nproc-per-node"
            f" {args.n_gpu} train.py."
        )
    for name in ("is_deepspeed_enabled", "is_fsdp_enabled"):
        if getattr(trainer, name, False):
            raise UnsupportedError(
                f"{name.split('_')[1]} is not supported by record_trainer: start the script with"
                " torchrun, or accelerate launch --multi_gpu, which use DistributedDataParallel."
            )
    sizes = [getattr(trainer, f"get_{name}_size", lambda: 1)() for name in ("tp", "cp", "sp")]
    if kind not in DATA_PARALLEL or max(sizes) > 1:
        raise UnsupportedError(
            f"the trainer runs as {kind} (tensor, context and sequence parallel over"
            f" {', '.join(map(str, sizes))}); record_trainer records DistributedDataParallel, where"
            " every process has the whole model."
        )


def require_one_process(trainer: Trainer, what: str) -> None:
    """Raise ``UnsupportedError`` where the trainer runs on several processes."""
    if trainer.args.world_size > 1:
        raise UnsupportedError(
            f"the trainer runs on {trainer.args.world_size} processes, and {what} on one. Train"
            " inside of culpa.integrations.transformers.record_trainer, which records several."
        )


def wrapper_of(trainer: Trainer, model: nn.Module) -> nn.Module:
    """What the trainer's loop calls: its ``DistributedDataParallel``, if there is one."""
    wrapped: Any = trainer.model_wrapped
    return wrapped if isinstance(wrapped, DistributedDataParallel) else model


def as_one_of(trainer: Trainer, processes: int) -> AbstractContextManager[None]:
    """Inside, the trainer computes its loss as one of so many processes.

    It multiplies by their number what it divided by the tokens of all of them.
    """
    return replaced(trainer.accelerator.state, "num_processes", processes)
