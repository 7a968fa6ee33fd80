"""Walking a run again: every observed update in turn, executed and checked against the record."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from culpa.errors import IntegrityError, ProblemError
from culpa.problem import Problem
from culpa.trajectory import digest, environment, rng
from culpa.trajectory.ahead import ahead
from culpa.trajectory.borrowing import borrowed
from culpa.trajectory.compared import Randomness, check_step, same_bits, untouched_by
from culpa.trajectory.engine import Engine, Executed
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
from culpa.trajectory.state import State
from culpa.trajectory.taken import Taker, is_that_of, may_take
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
    graph: Any = None
    """What came with ``grads`` from whoever took them; see ``taken.Taker``."""

    @property
    def index(self) -> int:
        """k."""
        return self.record.index


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


def forward(
    run: Run, engine: Engine, start: int, stop: int, taker: Taker | None = None
) -> Generator[Transition]:
    """Execute the observed updates [start, stop) from the nearest kept state, yielding each.

    Between two updates the consumer may draw random numbers and call the module, but must leave
    its tensors as they are. Memory: three states, and what ``taker`` keeps.

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
    taker = None if engine.fidelity.allow_drift else taker
    for transition in onward(run, engine, state, range(start, stop), randomness, taker):
        if transition.graph is None:  # else compared already
            check_step(run, engine, transition.record, randomness)
        yield transition


def segment(
    run: Run, engine: Engine, start: int, stop: int, taker: Taker | None = None
) -> Iterable[Transition]:
    """``forward`` between two kept states, compared with the second in everything.

    Updates are compared with the record by parameters and buffers; a gradient whose last bit is
    another can hide in the slots for a while. Then the segment is walked again without ``taker``.
    """
    if taker is not None:
        held: list[Transition] = []
        with suppress(IntegrityError):
            held.extend(forward(run, engine, start, stop, taker))
        if len(held) == stop - start:
            kept = run.state(stop).placed(engine.params, engine.buffers)
            plain = all(one.graph is None for one in held)
            if plain or same_bits(held[-1].after.flat(), kept.flat()):
                return held
        del held
        for stage in {run.step(k).stage for k in range(start, stop)}:
            taker.refuse(stage)
    return forward(run, engine, start, stop)


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
    run: Run,
    engine: Engine,
    state: State,
    updates: range,
    randomness: Randomness,
    taker: Taker | None = None,
) -> Generator[Transition]:
    """Execute recorded updates from any ``state``, yielding each.

    Nothing is compared, but for updates whose gradient ``taker`` took: they have the recorded bits.
    As for ``forward``, the consumer must leave the module's tensors as they are.
    """
    engine.load(state)
    state = state.placed(engine.params, engine.buffers)
    for record, batches, recorded in ahead(run, updates):
        if record.reset:
            engine.reset_optimizer()
            state = State(state.params, state.buffers)
        randoms = randomness.before(recorded, record)
        untouched = untouched_by(run, record)
        done, graph = None, None
        if taker is not None and may_take(record, batches):
            done, graph = _by_taker(taker, engine, record, state, batches[0], randoms[0], untouched)
        done = done or engine.execute(record, batches, randoms)
        randomness.after(randoms, record)
        after = engine.state()
        yield Transition(
            record,
            state,
            after,
            done.grads,
            done.loss,
            batches[record.discarded :],
            done.randoms,
            untouched,
            graph=graph,
        )
        state = after


def _by_taker(
    taker: Taker,
    engine: Engine,
    record: StepRecord,
    state: State,
    batch: Any,
    random: RandomState | None,
    untouched: frozenset[str],
) -> tuple[Executed | None, Any]:
    """An update by the taker's gradient, with its graph.

    Without a graph it is as the engine made it, and still to be compared; without anything, nothing
    has happened.
    """
    if random is None and record.drew_randomness:
        random = rng.capture()
    engine.prepare(record)
    taken = taker.take(record, state, batch, random, untouched)
    if taken is None:
        if random is not None:
            rng.restore(random)
        return None, None
    done = engine.execute(record, [batch], [random], taken=taken if taken.proved else None)
    same = digest.combine(engine.looked_at(untouched).digests()) == record.digest
    if same and (taken.proved or is_that_of(taken, done.grads, engine.buffers)):
        return done, taken.graph
    taker.refuse(record.stage)
    if not taken.proved:
        return done, None
    engine.load(state)
    if random is not None:
        rng.restore(random)
    return None, None
