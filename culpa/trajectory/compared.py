"""Whether an executed update is the recorded one, and where its random numbers began."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from culpa.errors import CulpaError, IntegrityError
from culpa.trajectory import digest, rng
from culpa.trajectory.engine import Engine
from culpa.trajectory.rng import RandomState
from culpa.trajectory.run import Run
from culpa.trajectory.schema import StepRecord
from culpa.trajectory.state import largest_difference
from culpa.tree import Tree


class Randomness:
    """Follows the generators through a walk, whatever its consumer draws between two updates."""

    def __init__(self) -> None:
        self._continued: RandomState | None = None

    def before(
        self, recorded: list[RandomState | None], record: StepRecord
    ) -> list[RandomState | None]:
        """The generators to restore before each micro-batch of an update."""
        if recorded[0] is None and record.drew_randomness:
            return [self._continued, *recorded[1:]]
        return recorded

    def after(self, recorded: Sequence[RandomState | None], record: StepRecord) -> None:
        """Note where an executed update left the generators."""
        if record.drew_randomness:
            self._continued = rng.capture()
        elif recorded[-1] is not None:
            self._continued = recorded[-1]


def same_bits(a: Tree, b: Tree) -> bool:
    """Whether two states, as flat trees, are one."""
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


def untouched_by(run: Run, record: StepRecord) -> frozenset[str]:
    """Parameters that no update up to this one trained, and a later one does."""
    joined = run.tables.joined
    return run.tables.frozen_before(record.index + 1) if joined else frozenset[str]()


def check_step(run: Run, engine: Engine, record: StepRecord, randomness: Randomness) -> None:
    """Raise unless the engine is where the record says that update k led to, bit for bit.

    A session that allows drift measures it instead, at the states that the record keeps.
    """
    seen = engine.looked_at(untouched_by(run, record))
    digests = seen.digests()
    same, fidelity = digest.combine(digests) == record.digest, engine.fidelity
    fidelity.exact = fidelity.exact and (same or not fidelity.allow_drift)
    if not fidelity.exact and record.index + 1 in run.kept_states:
        fidelity.measure(engine.live(), run.state(record.index + 1))
    if same or fidelity.allow_drift:
        return
    size = digest.FINGERPRINT_BYTES
    recorded = [record.fingerprints[i : i + size] for i in range(0, len(record.fingerprints), size)]
    wrong = [n for n, d, f in zip(seen.names, digests, recorded, strict=False) if d[:size] != f]
    shown = ", ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
    raise IntegrityError(
        f"update {record.index} of {run.path} does not reproduce: the replay differs from the"
        " record in"
        f" {shown or 'its set of tensors'}{_how_much(run, engine, record, randomness)}."
        " Usual causes: a loss or data pipeline that is not the recorded one, an undeclared"
        " clip_grad_norm_, weights edited between updates, or randomness drawn elsewhere."
    )


def _how_much(run: Run, engine: Engine, record: StepRecord, randomness: Randomness) -> str:
    """The largest difference, measured where the record keeps values: at the next kept state."""
    kept = next((k for k in run.kept_states if k > record.index), None)
    if kept is None:
        return ""
    try:
        for k in range(record.index + 1, kept):
            later = run.step(k)
            if later.reset:
                engine.reset_optimizer()
            randoms = randomness.before(run.randoms_of(k), later)
            engine.execute(later, run.batches_of(k), randoms, keep=False)
            randomness.after(randoms, later)
        truth: Tree = run.state(kept).flat()
    except CulpaError:  # the first update that differs is what must be told
        return ""
    name, size = largest_difference(engine.state().flat(), truth)
    return f", at kept state {kept} by up to {size:.3g} (in {name})" if name else ""
