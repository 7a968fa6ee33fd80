"""What the recorder of one rank does with the other ranks."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import msgspec

from culpa.errors import RecordError, UnsupportedError
from culpa.problem import Problem
from culpa.trajectory import digest
from culpa.trajectory.chain import StepDetail
from culpa.trajectory.observer import Observer, encode_hypers
from culpa.trajectory.ranks import joined
from culpa.trajectory.ranks.buckets import lay_buckets
from culpa.trajectory.ranks.group import Ranks, ranks
from culpa.trajectory.ranks.sharded import Sharded
from culpa.trajectory.ranks.wrapped import Replicated, wrapper_of
from culpa.trajectory.resume import Resumption
from culpa.trajectory.state import State
from culpa.trajectory.together import Stepper
from culpa.tree import Tree


class Partners:
    """The other ranks, as one rank's recorder deals with them.

    Args:
        group: all ranks.
        wrapper: what reduces their gradients.
    """

    def __init__(self, group: Ranks, wrapper: Replicated | Sharded) -> None:
        self.group = group
        self._wrapper = wrapper
        self.observer = wrapper.observer
        self.replicated = wrapper.replicated
        self.bare, self.start, self.stop = wrapper.bare, wrapper.start, wrapper.stop
        self.again = wrapper.again

    def before_step(
        self, observer: Observer, last: Callable[[], State], pending: int, usual: int
    ) -> None:
        """All ranks are about to make an update; say on the observer how it is reduced.

        Before the first one of a stage they compare what they train.

        Raises:
            RecordError: where they differ, or the update is not one of all ranks.
        """
        if usual and pending != usual:
            raise RecordError(
                f"this update is made of {pending} micro-batches of this rank, those before of"
                f" {usual}. On several ranks every update of a stage must have as many; drop the"
                " last, shorter accumulation."
            )
        if usual == 0:
            self._compare(observer, last(), pending)
        if self.replicated:
            self._tell(observer, pending)

    def after_step(self, observer: Observer, pending: int) -> None:
        """They have made it: gradients that ``step(closure)`` made inside may be reduced otherwise.

        DistributedDataParallel lays its buckets anew in a forward pass; how often FSDP2 reduced a
        gradient is known only now.
        """
        self._tell(observer, pending)

    def _tell(self, observer: Observer, pending: int) -> None:
        reduction = self._wrapper.reduction(pending)
        if reduction != observer.spec.reduction:
            summed = {name for names in reduction.buckets for name in names}
            missing = [name for name in observer.held if name not in summed]
            if missing:
                raise RecordError(
                    f"the optimizer holds {missing[0]}, whose gradients are not summed over the"
                    " ranks (it did not require one when DistributedDataParallel was made, or is"
                    " left out; or requires none now). Wrap the model again when that changes."
                )
            observer.specify(msgspec.structs.replace(observer.spec, reduction=reduction))

    def require_resumable(self) -> None:
        """Raise ``UnsupportedError`` if there is more of a rank than the record keeps."""
        wrapper = self._wrapper
        moving = [n for n, _ in wrapper.module.named_buffers() if _is_moving(n)]
        if moving and not wrapper.broadcast_buffers:
            raise UnsupportedError(
                f"with fully_shard or broadcast_buffers=False every rank has a {moving[0]} of its"
                " own, and only that of rank 0 is recorded: such a run cannot be resumed on several"
                " ranks. Wrap the model without that option, or record anew."
            )

    def before_going_on(self, ahead: Resumption, problem: Problem, batch: Any) -> None:
        """The script of every rank arrived at the update where the record goes on.

        Raises:
            RecordError: if the wrapper does not sum gradients as it did.
        """
        if self.replicated:  # FSDP2 says by which groups it reduces from the beginning
            lay_buckets(self._wrapper.wrapper, problem, batch, ahead.record)

    def _compare(self, observer: Observer, last: State, pending: int) -> None:
        buffers = last.buffers if not self._wrapper.broadcast_buffers else {}
        params = last.params if self.replicated else {}
        named = {"parameters": params, "buffers": _fixed(observer, buffers)}
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


def after_step(others: Partners | None, observer: Observer, pending: int) -> None:
    """``Partners.after_step`` where there are such."""
    if others is not None:
        others.after_step(observer, pending)


def on_first(others: Partners | None, work: Callable[[], None]) -> None:
    """Do something on the first rank, for all of them, or where there is one process only."""
    if others is None:
        work()
    else:
        others.group.on_first(work)


@contextmanager
def together(others: Partners | None) -> Generator[None]:
    """Inside, an update that is executed again is executed by all ranks, each on what it holds."""
    if others is None:
        with joined.live(None):
            yield
    else:
        with others.again(), joined.live(others.group, shard=not others.replicated):
            yield


def alone(others: Partners | None) -> bool:
    """Whether a rank can read its optimizer's state without the others."""
    return others is None or others.replicated


def stop(others: Partners | None) -> None:
    """The recording has ended."""
    if others is not None:
        others.stop()


def apart(others: Partners | None, detail: StepDetail) -> bool:
    """Whether the generators before an update are to be kept, wherever they were left.

    A process that executes all ranks' parts in turn comes to each from another rank's generators.
    """
    return others is not None and detail.drew_randomness


def _fixed(observer: Observer, buffers: Tree) -> Tree:
    """Without the running statistics of BatchNorm, which no gradient in training depends on."""
    return {name: value for name, value in buffers.items() if not _is_moving(name)}


def _is_moving(name: str) -> bool:
    return name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")


def partners(problem: Problem, optimizer: Stepper, scaler: Any) -> Partners | None:
    """The other ranks of a recording; ``None`` if one process trains.

    Raises:
        UnsupportedError: if several train in a way that is not modelled.
    """
    wrapper = wrapper_of(problem, optimizer)
    if wrapper is None:
        return None
    if scaler is not None:
        raise UnsupportedError(
            "a GradScaler on several ranks cannot be recorded: which updates it skips is not known"
            " to every rank at once. Train in bfloat16, which needs none."
        )
    return Partners(ranks(), wrapper)
