"""What ``DistributedDataParallel`` does to a model that is recorded, and what is refused of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import SyncBatchNorm

from culpa.errors import RecordError, UnsupportedError
from culpa.problem import Problem
from culpa.trajectory.observer import Observer
from culpa.trajectory.ranks.bare import is_sharded
from culpa.trajectory.ranks.group import backend_of, several
from culpa.trajectory.ranks.sharded import Sharded
from culpa.trajectory.schema import Reduction
from culpa.trajectory.together import Stepper, members_of


class Replicated:
    """A model that ``DistributedDataParallel`` wraps, as a recording deals with it."""

    replicated = True
    """Whether every rank holds all parameters."""
    observer: Callable[..., Observer] = Observer

    def __init__(self, wrapper: Any) -> None:
        self.wrapper = wrapper
        self.module: nn.Module = wrapper.module
        self.broadcast_buffers: bool = wrapper.broadcast_buffers
        self._known: tuple[bool, Reduction] | None = None

    def reduction(self, micro_batches: int) -> Reduction:
        """How the gradients of an update are reduced, as of now.

        Raises:
            RecordError: inside of ``join()``.
        """
        require_all_ranks(self.wrapper)
        if self._known is None or self._known[0] != rebuilt(self.wrapper):
            self._known = rebuilt(self.wrapper), reduction_of(self.wrapper)
        return self._known[1]

    def bare(self) -> AbstractContextManager[None]:
        """Inside, the module is as it was before it was wrapped: as it is."""
        return nullcontext()

    again = bare
    """The same: every rank executes an update again with whole parameters."""

    def start(self) -> None:
        """The recording begins."""

    def stop(self) -> None:
        """The recording has ended."""


def wrapper_of(problem: Problem, optimizer: Stepper) -> Replicated | Sharded | None:
    """What makes one update of several ranks' gradients; ``None``: one process trains.

    Raises:
        UnsupportedError: if several processes train in a way that is not modelled.
    """
    if is_sharded(problem.model):
        return Sharded(problem.model, optimizer)
    if not several():
        return None
    wrapper = problem.wrapper
    if wrapper is None:
        raise UnsupportedError(
            "this process is one of several (torch.distributed), and Problem(model=...) is"
            f" {_what(problem.model)}. Give it the DistributedDataParallel that the loop calls:"
            " culpa.Problem(DistributedDataParallel(model), loss), on every rank. If every process"
            " trains a model of its own, let it record before init_process_group, or without."
        )
    ways = _unsupported(wrapper, optimizer)
    if ways:
        raise UnsupportedError(f"training on several ranks with {ways[0]} cannot be recorded.")
    return Replicated(wrapper)


def _what(model: nn.Module) -> str:
    kinds = [kind.__name__ for kind in type(model).__mro__]
    if "FullyShardedDataParallel" in kinds:
        return "a FullyShardedDataParallel, which is not supported"
    return f"a {type(model).__name__} that nothing wraps"


def _unsupported(wrapper: Any, optimizer: Stepper) -> list[str]:
    """What of the job is not modelled, and the way round."""
    size = wrapper.process_group.size()
    layers = [n for n, m in wrapper.module.named_modules() if isinstance(m, SyncBatchNorm)]
    # By name: importing the class takes seconds.
    classes = [kind.__name__ for member in members_of(optimizer) for kind in type(member).__mro__]
    said = (
        (size != dist.get_world_size(), f"a process group of {size} ranks, of more that there are"),
        (bool(layers), f"SyncBatchNorm ({', '.join(layers[:2])}): leave BatchNorm as it is"),
        (
            "ZeroRedundancyOptimizer" in classes,
            "ZeroRedundancyOptimizer: hand the optimizer itself to every rank",
        ),
        (bool(wrapper._comm_hooks), "a communication hook: train without register_comm_hook"),
        (bool(wrapper._get_ddp_logging_data().get("comm_hook")), "a built-in communication hook"),
        (wrapper.mixed_precision is not None, "DDP's mixed_precision: use torch.autocast"),
        (
            wrapper.gradient_as_bucket_view and size & (size - 1) != 0,
            f"gradient_as_bucket_view on {size} ranks, which divides in another order: leave it"
            " out, or train on 2, 4, 8, ...",
        ),
    )
    return [text for wrong, text in said if wrong]


def reduction_of(wrapper: Any) -> Reduction:
    """How it reduces gradients from its next backward pass on, as recorded."""
    names = {id(p): name for name, p in wrapper.module.named_parameters()}
    buckets = wrapper.reducer._get_zeros_like_grad_buckets()
    return Reduction(
        wrapper.process_group.size(),
        backend_of(wrapper.process_group, next(wrapper.module.parameters()).device.type),
        tuple(tuple(names[id(p)] for p in bucket.parameters()) for bucket in buckets),
    )


def require_all_ranks(wrapper: Any) -> None:
    """Raise ``RecordError`` inside of ``join()``, where some ranks may have no batch left."""
    if wrapper._join_config.enable:
        raise RecordError(
            "the loop runs inside of DistributedDataParallel.join(), for ranks with different"
            " numbers of batches; an update without a batch of every rank cannot be recorded. Let"
            " every rank have as many: DistributedSampler(drop_last=True)."
        )


def rebuilt(wrapper: Any) -> bool:
    """Whether it has laid its buckets anew, which it does once, after its first backward pass."""
    return bool(wrapper._has_rebuilt_buckets)
