"""The recorder's proof, on the first update of every stage, that the loop does what it says."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from culpa import tree
from culpa.errors import IntegrityError, NotReproducibleError, RecordError
from culpa.trajectory import rng
from culpa.trajectory.borrowing import borrowed
from culpa.trajectory.chain import StepDetail
from culpa.trajectory.engine import Engine, Executed
from culpa.trajectory.observer import Observer
from culpa.trajectory.ranks.joined import verdict
from culpa.trajectory.ranks.precision import computed, precision_of
from culpa.trajectory.rng import RandomState
from culpa.trajectory.schema import MicroBatch, StepRecord
from culpa.trajectory.state import State, largest_difference
from culpa.tree import Tree

Drawn = tuple[Any, RandomState | None]
"""A batch, and the generators when it was handed to the loop; ``None``: with the batch before."""


@dataclass(frozen=True)
class Before:
    """The state an update started from, and whether its optimizer was fresh."""

    state: State
    fresh: bool


def prove_reproducible(observer: Observer, pending: Sequence[Drawn]) -> None:
    """Evaluate the loss twice from one random state; raise unless both are the same bits."""
    problem = computed(observer.problem, precision_of(observer.spec.reduction))
    batch, random = [(b, r) for b, r in pending if r is not None][-1]
    values: list[torch.Tensor] = []
    fixed = [name for name, _ in problem.model.named_parameters()]
    for _ in range(2):
        with borrowed(problem.model, fixed):  # a forward pass may move buffers, which are state
            rng.restore(random)
            values.append(problem.evaluate(batch).detach())
    if not torch.equal(values[0], values[1]):
        raise NotReproducibleError(
            f"the loss of one batch from one random state was {float(values[0])!r} and then"
            f" {float(values[1])!r}. It draws randomness that no generator of Python, NumPy or"
            " torch accounts for, or keeps state outside of the model. Nothing could be replayed."
        )


def identify(
    observer: Observer,
    before: Before,
    pending: list[Drawn],
    detail: StepDetail,
    hypers: tuple[dict[str, Any], ...],
    after: State,
    index: int,
    usual: int,
) -> tuple[list[Drawn], StepDetail, RandomState]:
    """Execute the update again from ``before`` and return the reading of it that gives ``after``.

    The generators as that left them come with it. Several batches before one update may be
    micro-batches, or batches that the loop left out; each reading is tried, and only one that
    reproduces every bit is taken.

    Raises:
        RecordError: if none does, naming the update, the worst parameter and the likely cause.
    """
    skipped, count = pending[: detail.discarded], len(pending) - detail.discarded
    readings = [(pending, detail)]
    if count > 1 and detail.weights is None:
        if usual > count:
            partial = msgspec.structs.replace(detail, weights=(1 / usual,) * count)
            readings.append((pending, partial))
        if pending[-1][1] is not None:
            readings.append((skipped + pending[-1:], detail))
    there, failures = observer.comparable(after), list[tuple[str, float, Tree]]()
    for drawn, facts in readings:
        with _executed_again(observer, before, drawn, facts, hypers, index) as (engine, done):
            here = observer.comparable(engine.live())  # not a copy of it: that may be large
            flat = there.flat() if after.slots else _without_slots(here, there)
            name, size = verdict(*largest_difference(here.flat(), flat))
            if not name:
                return drawn, facts, rng.capture()
            failures.append((name, size, done.grads if not failures else {}))
    name, size, grads = failures[0]
    live = observer.gradients()
    raise RecordError(
        f"update {index} is not what the record would say: executed again from the same state,"
        f" {name.partition('/')[2]} differs by up to {size:.3g}."
        f" {_cause(grads, live, count, detail)}"
    )


def _without_slots(state: State, after: State) -> Tree:
    return after.flat() | {n: v for n, v in state.flat().items() if n.startswith("slots/")}


@contextmanager
def _executed_again(
    observer: Observer,
    before: Before,
    drawn: Sequence[Drawn],
    detail: StepDetail,
    hypers: tuple[dict[str, Any], ...],
    index: int,
) -> Generator[tuple[Engine, Executed]]:
    """Inside, the model is where the update leads when it is executed again."""
    record = StepRecord(
        index=index,
        optimizer=observer.spec,
        hypers=hypers,
        micro_batches=tuple(MicroBatch(0, (), None) for _ in drawn),
        digest=b"",
        fingerprints=b"",
        **msgspec.structs.asdict(detail),
    )
    fixed = observer.params.keys() - observer.held.keys()  # a base model is not copied
    with borrowed(observer.problem.model, fixed):
        engine = Engine(observer.problem)
        engine.load(before.state)
        if before.fresh:
            engine.reset_optimizer()
        try:
            done = engine.execute(record, [b for b, _ in drawn], [r for _, r in drawn])
        except IntegrityError as error:
            raise RecordError(
                f"update {index} could not be executed again:"
                f" {type(error.__cause__).__name__}: {error.__cause__}. A replay calls the"
                " optimizer's step() after backward(), without a closure, and with its state as it"
                " was recorded; an optimizer that evaluates the loss itself inside of a step (SAM)"
                " cannot be recorded."
            ) from error
        yield engine, done


def _cause(grads: Tree, live: Tree, count: int, detail: StepDetail) -> str:
    """What the live gradients, compared with the problem's, say about the loop."""
    if count > 1 and detail.weights is None:
        return (
            f"{count} batches were drawn before this update. If the loop fetches batches ahead or"
            " weights them, say which make an update: `with recorder.step(*micro_batches,"
            " weights=...)`."
        )
    size = tree.norm(grads)
    if live.keys() != grads.keys() or size == 0.0:
        return (
            "Its gradients are not those of loss(model, batch): is the loss the one the loop uses?"
        )
    factor = tree.dot(live, grads) / size**2
    if not _close(live, tree.scale(factor, grads)):
        bound = tree.largest(live)
        if _close(live, tree.map_values(lambda g: g.clamp(-bound, bound), grads)):
            return (
                f"The loop's gradients are those of loss(model, batch) cut at {bound:.4g}:"
                " clip_grad_value_ (then pass clip_grad_value=clip_value to culpa.record)."
            )
        if all(_parallel({n: live[n]}, {n: grads[n]}) for n in live):
            return (
                "Its gradients are those of loss(model, batch), scaled by another factor for some"
                " parameters: scaled by hand, or clip_grad_norm_ on a part of them. Clip all"
                " parameters at once, and pass clip_grad_norm=max_norm to culpa.record."
            )
        return (
            "The loop's gradients are not those of loss(model, batch) on this batch: another loss, "
            "another batch, or randomness drawn between fetching the batch and the forward pass."
        )
    if abs(factor - 1) > 1e-5 and detail.clip_grad_norm is None:
        return (
            f"The loop's gradients are {factor:.4g} times those of loss(model, batch): a scaled"
            " loss, clip_grad_norm_ (then pass clip_grad_norm=max_norm to culpa.record) or a"
            " GradScaler (then scaler=scaler)."
        )
    return (
        "The gradients agree, so something else than torch.optim changed the parameters: weights "
        "edited after the step, or a wrapped optimizer."
    )


def _close(a: Tree, b: Tree) -> bool:
    return tree.norm(tree.subtract(a, b)) <= 1e-4 * tree.norm(a)


def _parallel(a: Tree, b: Tree) -> bool:
    """Whether one is a multiple of the other."""
    size = tree.norm(b)
    return size > 0.0 and _close(a, tree.scale(tree.dot(a, b) / size**2, b))
