"""Walking a run again: every observed update in turn, executed and checked against the record."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from culpa.errors import CulpaError, IntegrityError, ProblemError
from culpa.problem import Problem
from culpa.trajectory import digest, environment, rng
from culpa.trajectory.ahead import ahead
from culpa.trajectory.borrowing import borrowed
from culpa.trajectory.engine import Engine
from culpa.trajectory.fidelity import Fidelity
from culpa.trajectory.fits import different_model
from culpa.trajectory.heap import keep_freed
from culpa.trajectory.ranks.afterwards import require_shards
from culpa.trajectory.ranks.bare import is_sharded
from culpa.trajectory.ranks.joined import holders
from culpa.trajectory.ranks.lent import held_in_shards, pieces_of
from culpa.trajectory.rng import RandomState
from culpa.trajectory.run import Run
from culpa.trajectory.schema import StepRecord
from culpa.trajectory.state import State, largest_difference
from culpa.tree import Tree


@dataclass(frozen=True)
class Transition:
    """One observed update s_k -> s_{k+1} with all that it was made of.

    ``before`` is the state the update started from, after a recorded reset of the optimizer;
    ``grads`` the gradients as ``backward`` left them, before clipping; ``randoms`` the generators
    before each micro-batch's forward, empty if the update draws nothing.
    """

    record: StepRecord
    before: State
    after: State
    grads: Tree
    loss: float
    batches: Sequence[Any]
    randoms: Sequence[RandomState]
    untouched: frozenset[str] = frozenset()
    """Parameters that trained only later: no counterfactual differs in them yet."""
    rounded: bool = False
    """Whether it waited in half precision: ``grads`` are not those at ``before`` to every digit."""

    @property
    def index(self) -> int:
        """k."""
        return self.record.index


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


@contextmanager
def session(run: Run, problem: Problem, allow_drift: bool = False) -> Generator[Engine]:
    """An engine on the problem's module under the run's recorded settings; all restored after.

    With ``allow_drift`` nothing is refused for not being bitwise; ``engine.fidelity`` measures it.

    Raises:
        ProblemError: if the model's parameters or buffers are not those of the run, or sharded, or
            a problem by stages has not its stages.
        EnvironmentDifference: if the process differs from the recording one in what cannot be set.
    """
    model = problem.model
    if is_sharded(model):
        raise ProblemError(
            f"the model given for {run.path} is one that fully_shard was applied to. A run is"
            " walked again with the model as it was before: build one that nothing shards."
        )
    wrong = different_model(
        run.manifest, dict(model.named_parameters()), dict(model.named_buffers())
    )
    if wrong:
        raise ProblemError(
            f"the model is not the one recorded in {run.path}: {'; '.join(wrong[:5])}. Build it as "
            "the training script did."
        )
    if holders() is None and any(p.is_meta for p in model.parameters()):
        raise ProblemError(
            f"the model given for {run.path} is on the meta device, without values: only inside of"
            " culpa.across_ranks(shard=True) can it be. Build it as the training script did."
        )
    losses = 1 + max((run.step(stage.start).loss for stage in run.stages), default=0)
    complete = run.manifest.status == "complete"
    problem.require_stages([stage.name for stage in run.stages], losses, complete)
    optimizers = {run.step(stage.start).optimizer for stage in run.stages}
    reductions, by_reference = {o.reduction for o in optimizers}, run.frozen.by_reference
    require_shards(str(run.path), reductions, allow_drift)
    keep_freed()
    recorded, given = run.manifest.environment, dict(model.named_parameters())
    apart = holders()
    held = nullcontext() if apart is None else held_in_shards(model, pieces_of(apart))
    with environment.as_recorded(recorded), held:
        here = environment.capture(list(model.parameters()))
        if not allow_drift:
            environment.require_same(recorded, here, str(run.path))
        same = not any(d.matters for d in environment.compare(recorded, here))
        run.frozen.give(given)
        with borrowed(model, by_reference if apart is None else ()):
            engine = Engine(problem, Fidelity(allow_drift, same))
            if apart is not None or not by_reference:
                engine.load(State(run.frozen_parameters()))
            yield engine


def forward(run: Run, engine: Engine, start: int, stop: int) -> Generator[Transition]:
    """Execute the observed updates [start, stop) from the nearest kept state, yielding each.

    Between two updates the consumer may draw random numbers and call the module, but must leave
    its tensors as they are. Memory: three states.

    Raises:
        IntegrityError: at the first update whose result is not the recorded one, bit for bit,
            unless the session allows drift.
    """
    at, randomness = run.kept_before(start), Randomness()
    state = run.state(at)
    if at < start:
        for _ in checked(run, engine, state, range(at, start), randomness):
            pass
        state = engine.state()
    for transition in onward(run, engine, state, range(start, stop), randomness):
        check_step(run, engine, transition.record, randomness)
        yield transition


def checked(
    run: Run, engine: Engine, state: State, updates: range, randomness: Randomness
) -> Generator[int]:
    """Execute observed updates from ``state``, their first one's, and compare each with the record.

    Yields the index of each; ``engine.live()`` is then the state after it. Nothing is copied, so
    that this costs an update and its digest.

    Raises:
        IntegrityError: as ``forward`` does.
    """
    engine.load(state)
    for record, batches, recorded in ahead(run, updates):
        if record.reset:
            engine.reset_optimizer()
        randoms = randomness.before(recorded, record)
        engine.execute(record, batches, randoms, keep=False)
        randomness.after(randoms, record)
        check_step(run, engine, record, randomness)
        yield record.index


def onward(
    run: Run, engine: Engine, state: State, updates: range, randomness: Randomness
) -> Generator[Transition]:
    """Execute recorded updates from any ``state``, yielding each; nothing is compared.

    As for ``forward``, the consumer must leave the module's tensors as they are.
    """
    engine.load(state)
    state = state.placed(engine.params, engine.buffers)
    for record, batches, recorded in ahead(run, updates):
        if record.reset:
            engine.reset_optimizer()
            state = State(state.params, state.buffers)
        randoms = randomness.before(recorded, record)
        done = engine.execute(record, batches, randoms)
        randomness.after(randoms, record)
        after = engine.state()
        k = record.index
        untouched = run.tables.frozen_before(k + 1) if run.tables.joined else frozenset[str]()
        body = batches[record.discarded :]
        yield Transition(record, state, after, done.grads, done.loss, body, done.randoms, untouched)
        state = after


def check_step(run: Run, engine: Engine, record: StepRecord, randomness: Randomness) -> None:
    """Raise unless the engine is where the record says that update k led to, bit for bit.

    A session that allows drift measures it instead, at the states that the record keeps.
    """
    joined = run.tables.joined
    seen = engine.looked_at(run.tables.frozen_before(record.index + 1) if joined else frozenset())
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
