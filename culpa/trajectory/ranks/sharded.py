"""What ``fully_shard`` (FSDP2) does to a model that is recorded, and what is refused of it.

PyTorch tells how it shards in private attributes only. They are read here and in bare.py, nowhere
else; that they say what happens is proved at the first update of every stage, which is executed
again by ``shards`` and ``reduce`` and compared bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch.distributed as dist
from torch import nn

from culpa.errors import RecordError, UnsupportedError
from culpa.trajectory import digest
from culpa.trajectory.ranks.bare import bare, groups_of, in_pieces, reshard, states_of
from culpa.trajectory.ranks.group import backend_of, several
from culpa.trajectory.ranks.observing import ShardObserver
from culpa.trajectory.schema import Precision, Reduction
from culpa.trajectory.together import Stepper, members_of

ELEMENTWISE = (
    *("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax"),
    *("Adagrad", "Adadelta", "ASGD", "RMSprop"),
)
"""Classes of torch.optim whose step on a shard is that of the whole."""


class Sharded:
    """A model that ``fully_shard`` was applied to, as a recording deals with it.

    Raises:
        UnsupportedError: if it is trained in a way that is not modelled.
    """

    wrapper = None
    replicated = False
    """Whether every rank holds all parameters."""
    broadcast_buffers = False
    observer: Callable[..., ShardObserver] = ShardObserver

    def __init__(self, module: nn.Module, optimizer: Stepper) -> None:
        if not several():
            raise UnsupportedError(
                "this process is the only one, so that fully_shard has nothing to shard. Record"
                " the model without it."
            )
        reshard(module)
        self.module = module
        ways = [text for wrong, text in _unsupported(module, optimizer) if wrong]
        if ways:
            raise UnsupportedError(f"training with fully_shard and {ways[0]} cannot be recorded.")
        self._names = {id(p): name for name, p in module.named_parameters()}
        self._reduced = dict.fromkeys(self._names.values(), 0)
        self._hooks: list[Any] = []

    def start(self) -> None:
        """The recording begins: count how often each gradient is reduced."""
        for name, p in self.module.named_parameters():
            trained = p.requires_grad  # torch takes hooks of such only; others may join later
            p.requires_grad_(True)
            self._hooks.append(p.register_post_accumulate_grad_hook(self._counting(name)))
            p.requires_grad_(trained)

    def _counting(self, name: str) -> Callable[[Any], None]:
        def count(_: Any) -> None:
            self._reduced[name] += 1

        return count

    def reduction(self, micro_batches: int) -> Reduction:
        """How the gradients of the update that was made were reduced.

        Raises:
            RecordError: if some of its micro-batches were reduced together, and others not.
        """
        counts = {count for count in self._reduced.values() if count}
        self._reduced = dict.fromkeys(self._reduced, 0)
        if counts - {1} and max(counts) != micro_batches:
            raise RecordError(
                f"the gradients of this update were reduced {max(counts)} times, of"
                f" {micro_batches} micro-batches. Let fully_shard reduce after each of them, or"
                " after the last only (set_requires_gradient_sync), and make no other backward"
                " pass while recording."
            )
        buckets = [
            tuple(self._names[id(p.sharded_param)] for p in group.fsdp_params if _trains(p))
            for group in groups_of(self.module)
        ]
        mesh = next(iter(groups_of(self.module))).mesh_info.mesh
        return Reduction(
            mesh.size(),
            backend_of(mesh.get_group(), mesh.device_type),
            tuple(bucket for bucket in buckets if bucket),
            sharded=True,
            each=micro_batches > 1 and max(counts, default=1) > 1,
            precision=tuple(self._precision()),
        )

    def _precision(self) -> Iterator[Precision]:
        modules = {id(module): name for name, module in self.module.named_modules()}
        for state in states_of(self.module):
            policy, (module, *_) = state._mp_policy, state._modules
            groups = [group for group in groups_of(module) if group.modules[0] is module]
            params = [p for group in groups for p in group.fsdp_params]
            found = Precision(
                modules[id(module)],
                tuple(self._names[id(p.sharded_param)] for p in params),
                _dtype_name(policy.param_dtype),
                _dtype_name(policy.reduce_dtype),
                _dtype_name(policy.output_dtype),
                policy.cast_forward_inputs,
            )
            if found.params or found.reduce or found.output:
                yield found

    def bare(self) -> AbstractContextManager[None]:
        """Inside, the module is as it was before ``fully_shard``."""
        return bare(self.module)

    def again(self) -> AbstractContextManager[None]:
        """Inside, the module computes with this rank's shards, without ``fully_shard``."""
        return in_pieces(self.module)

    def stop(self) -> None:
        """The recording has ended."""
        for hook in self._hooks:
            hook.remove()


def _dtype_name(dtype: Any) -> Any:
    return "" if dtype is None else digest.dtype_name(dtype)


def _trains(param: Any) -> bool:
    return param.sharded_param.requires_grad


def _unsupported(module: nn.Module, optimizer: Stepper) -> Iterator[tuple[bool, str]]:
    """What of the job is not modelled, and the way round."""
    groups = [*groups_of(module)]
    managed = {id(p.sharded_param) for group in groups for p in group.fsdp_params}
    outside = [n for n, p in module.named_parameters() if id(p) not in managed]
    yield (
        bool(outside),
        f"parameters outside of it ({', '.join(outside[:2])}), whose gradients it does not reduce:"
        " call fully_shard on the whole model at last, without ignored_params",
    )
    layers = [n for n, m in module.named_modules() if isinstance(m, nn.SyncBatchNorm)]
    yield bool(layers), f"SyncBatchNorm ({', '.join(layers[:2])}): leave BatchNorm as it is"
    for group in groups:
        yield from _of_group(group)
    for member in members_of(optimizer):
        name = type(member).__name__
        ours = type(member).__module__.startswith("torch.")
        yield (
            ours and name not in ELEMENTWISE,
            f"{name}, whose step on a parameter is not that on its shards: take one of"
            f" {', '.join(ELEMENTWISE)}",
        )


def _of_group(group: Any) -> Iterator[tuple[bool, str]]:
    mesh, dtypes = group.mesh_info.mesh, {p.sharded_param.dtype for p in group.fsdp_params}
    policy = group.mp_policy
    casts = policy.param_dtype or policy.reduce_dtype or policy.output_dtype
    yield (
        mesh.ndim != 1 or type(group.mesh_info).__name__ != "FSDPMeshInfo",
        "a mesh of several dimensions (HSDP, tensor parallelism): shard over all ranks, in one",
    )
    yield (
        mesh.size() != dist.get_world_size(),
        f"a mesh of {mesh.size()} ranks, of {dist.get_world_size()} that there are: take all",
    )
    yield (
        mesh.mesh.flatten().tolist() != [*range(mesh.size())],
        "a mesh whose ranks are in another order: take init_device_mesh(type, (N,))",
    )
    yield (
        any(p.fsdp_placement.dim != 0 or p.is_dtensor for p in group.fsdp_params),
        "shard_placement_fn, or parameters that were DTensors before: leave them to be sharded"
        " along dim 0",
    )
    yield (
        bool(casts) and (len(group.modules) > 1 or len(dtypes) > 1),
        "a MixedPrecisionPolicy of several modules at once, or of parameters of several dtypes:"
        " call fully_shard for each module, and leave them in one dtype",
    )
    wider = policy.param_dtype is not None and any(
        policy.param_dtype.itemsize > dtype.itemsize for dtype in dtypes
    )
    yield wider, "a MixedPrecisionPolicy that computes in a wider dtype: keep parameters in that"
    yield (
        type(group.offload_policy).__name__ != "OffloadPolicy",
        "CPUOffloadPolicy: leave it out",
    )
    yield (
        group.gradient_divide_factor is not None
        or getattr(group, "force_sum_reduction_for_comms", False),
        "set_gradient_divide_factor, or set_force_sum_reduction_for_comms: leave the mean as it is",
    )
    yield (
        getattr(group, "reduce_scatter_unused_params", False),
        "set_reduce_scatter_unused_params: leave it out",
    )
    custom = type(group._all_gather_comm).__module__, type(group._reduce_scatter_comm).__module__
    yield (
        group._all_reduce_hook is not None or any(not m.startswith("torch.") for m in custom),
        "communication of your own (set_custom_all_gather, set_custom_reduce_scatter,"
        " set_all_reduce_hook): train without",
    )
