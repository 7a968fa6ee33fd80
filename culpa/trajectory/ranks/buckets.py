"""The buckets of ``DistributedDataParallel`` in a process that goes on with what another began.

DDP lays them by its parameters first and, in the forward pass after its first backward pass, by the
order in which gradients became ready. Three ranks and more add in an order that depends on where in
a bucket a number lies; so the buckets must be those of before.
"""

from __future__ import annotations

from typing import Any

from culpa.errors import RecordError
from culpa.problem import Problem
from culpa.trajectory.borrowing import borrowed, set_modes
from culpa.trajectory.ranks import wrapped
from culpa.trajectory.schema import StepRecord


def lay_buckets(wrapper: Any, problem: Problem, batch: Any, record: StepRecord) -> None:
    """Let a wrapper sum gradients as it did in an update; every rank calls this.

    Args:
        wrapper: the ``DistributedDataParallel``.
        problem: of the update.
        batch: one of its micro-batches, for a backward pass whose gradients are dropped.
        record: the update.

    Raises:
        RecordError: if its buckets are others even then.
    """
    recorded = record.optimizer.reduction
    if wrapped.reduction_of(wrapper) == recorded:
        return
    if not (wrapper.find_unused_parameters or wrapper.static_graph or wrapped.rebuilt(wrapper)):
        with borrowed(problem.model):
            set_modes(problem.model, record.evaluating)
            wrapper.reducer.prepare_for_forward()
            wrapper.reducer.prepare_for_backward([])
            problem.evaluate(batch).backward()
        wrapper._has_rebuilt_buckets = wrapper.reducer._rebuild_buckets()
    # Two numbers have one sum; but static_graph does more in the first backward pass of a process.
    matters = wrapper.static_graph or recorded is None or recorded.ranks > 2
    if matters and wrapped.reduction_of(wrapper) != recorded:
        raise RecordError(
            f"DistributedDataParallel sums gradients in other buckets than when update"
            f" {record.index} was recorded. Resume with the same model, bucket_cap_mb, backend and"
            " find_unused_parameters; with static_graph, or parameters that an update does not use,"
            " record anew."
        )
