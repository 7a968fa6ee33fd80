"""What the recorder of one rank does with the other ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import msgspec

from culpa.errors import OptionError, RecordError, UnsupportedError
from culpa.problem import Problem
from culpa.trajectory import digest
from culpa.trajectory.chain import StepDetail
from culpa.trajectory.observer import Observer, encode_hypers
from culpa.trajectory.ranks import execute, wrapped
from culpa.trajectory.ranks.group import Ranks, ranks
from culpa.trajectory.state import State
from culpa.trajectory.together import Stepper
from culpa.tree import Tree


class Partners:
    """The other ranks, as one rank's recorder deals with them.

    Args:
        group: all ranks.
        wrapper: what reduces their gradients.
    """

    def __init__(self, group: Ranks, wrapper: Any) -> None:
        self.group = group
        self._wrapper = wrapper
        self._told: tuple[bool, int] | None = None

    def before_step(
        self, observer: Observer, last: Callable[[], State], pending: int, usual: int
    ) -> None:
        """All ranks are about to make an update; say on the observer how it is reduced.

        Before the first one of a stage they compare what they train.

        Raises:
            RecordError: where they differ, or the update is not one of all ranks.
        """
        wrapped.require_all_ranks(self._wrapper)
        if usual and pending != usual:
            raise RecordError(
                f"this update is made of {pending} micro-batches of this rank, those before of"
                f" {usual}. On several ranks every update of a stage must have as many; drop the"
                " last, shorter accumulation."
            )
        if usual == 0:
            self._compare(observer, last(), pending)
        known = wrapped.rebuilt(self._wrapper), id(observer)
        if known != self._told:
            self._told = known
            reduction = wrapped.reduction_of(self._wrapper)
            summed = {name for names in reduction.buckets for name in names}
            missing = [name for name in observer.held if name not in summed]
            if missing:
                raise RecordError(
                    f"the optimizer holds {missing[0]}, whose gradients DistributedDataParallel"
                    " does not sum over the ranks (it did not require one when the model was"
                    " wrapped, or is left out). Wrap the model again when that changes."
                )
            observer.specify(msgspec.structs.replace(observer.spec, reduction=reduction))

    def _compare(self, observer: Observer, last: State, pending: int) -> None:
        buffers = last.buffers if not self._wrapper.broadcast_buffers else {}
        named = {"parameters": last.params, "buffers": _fixed(observer, buffers)}
        facts = {what: digest.combine(digest.tensor_digests(t)).hex() for what, t in named.items()}
        facts["optimizer"] = msgspec.json.encode(observer.spec.groups).decode()
        facts["hyperparameters"] = encode_hypers(observer.hypers()).decode()
        facts["micro-batches an update"] = str(pending)
        for rank, said in enumerate(self.group.everywhere(msgspec.msgpack.encode(facts))):
            there = msgspec.msgpack.decode(said, type=dict[str, str])
            differ = [what for what in facts if facts[what] != there[what]]
            if differ:
                raise RecordError(
                    f"rank {rank} and rank {self.group.rank} differ in {', '.join(differ)} before"
                    " the first update of a stage. Every rank must train the same model with the"
                    " same optimizer, on batches of its own."
                )


def before_step(
    others: Partners | None, observer: Observer, last: Callable[[], State], pending: int, usual: int
) -> bool:
    """``Partners.before_step`` where there are such; whether there are none."""
    if others is not None:
        others.before_step(observer, last, pending, usual)
    return others is None


def together(others: Partners | None) -> AbstractContextManager[None]:
    """Inside, an update that is executed again is executed by all ranks."""
    return execute.live(None if others is None else others.group)


def apart(others: Partners | None, detail: StepDetail) -> bool:
    """Whether the generators before an update are to be kept, wherever they were left.

    A process that executes all ranks' parts in turn comes to each from another rank's generators.
    """
    return others is not None and detail.drew_randomness


def _fixed(observer: Observer, buffers: Tree) -> Tree:
    """Without the running statistics of BatchNorm, which no gradient in training depends on."""
    moving = ("running_mean", "running_var", "num_batches_tracked")
    return {n: v for n, v in buffers.items() if n.rpartition(".")[2] not in moving}


def partners(
    problem: Problem, optimizer: Stepper, scaler: Any, *, resume: bool, append: bool
) -> Partners | None:
    """The other ranks of a recording; ``None`` if one process trains.

    Raises:
        UnsupportedError: if several train in a way that is not modelled.
        OptionError: for options that only a recording of one process has.
    """
    wrapper = wrapped.wrapper_of(problem, optimizer)
    if wrapper is None:
        return None
    if scaler is not None:
        raise UnsupportedError(
            "a GradScaler on several ranks cannot be recorded: which updates it skips is not known"
            " to every rank at once. Train in bfloat16, which needs none."
        )
    if resume or append:
        raise OptionError(
            "resume=True and append=True are for recordings of one process: a rank's generators and"
            " loaders are not kept. Record into a new folder, or pass overwrite=True."
        )
    return Partners(ranks(), wrapper)
