"""Counterfactuals by exact replay: history re-run without some of its updates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from jaxtyping import Float64
from safetensors.torch import save as save_tensors
from torch import Tensor

from culpa.behaviour import Behaviour
from culpa.errors import OptionError, StageError
from culpa.problem import Problem
from culpa.progress import Progress, Silent
from culpa.trajectory.ahead import ahead
from culpa.trajectory.compared import Randomness, check_step
from culpa.trajectory.engine import Engine
from culpa.trajectory.fidelity import BITWISE
from culpa.trajectory.files import write_durably
from culpa.trajectory.ranks.afterwards import first_writes, require_mine, whole_on_first
from culpa.trajectory.run import Run
from culpa.trajectory.state import on_cpu
from culpa.trajectory.walk import checked, session
from culpa.tree import Tree

COUNTERFACTUALS = ("skip", "restart", "zero-gradient")


def check_counterfactual(counterfactual: str) -> None:
    """Raise ``OptionError`` unless it is one of the three named in the documentation."""
    if counterfactual not in COUNTERFACTUALS:
        raise OptionError(
            f"counterfactual must be one of {', '.join(map(repr, COUNTERFACTUALS))}, got"
            f" {counterfactual!r}."
        )


@dataclass(frozen=True)
class Counterfactual:
    """The model that training ends with when some updates are not executed.

    Attributes:
        state: all parameters by name, theta_K(without S), on the CPU as ``run.final_state()`` is,
            whatever the model is on (frozen ones by reference: the given tensors).
        buffers: the buffers by name, on the CPU.
        without: the removed updates.
        counterfactual: which of the three meanings of "removed".
        updates_executed: the cost, in updates of the run (one more where none of the observed
            ones was on the way, to prove the problem).
        claim: ``"bitwise"``: exact; or ``"drift 3.1e-7"``, the relative drift that was measured
            where the environment is not the recorded one and ``allow_drift=True`` accepted that.
    """

    state: Tree
    buffers: Tree
    without: tuple[int, ...]
    counterfactual: str
    updates_executed: int
    claim: str
    _run: Run
    _problem: Problem

    def effect(self, behaviour: Behaviour) -> Float64[Tensor, " n"]:
        """The true effect per test point: gamma(theta_K) - gamma(theta_K without S), float64 [n].

        Positive: the removed updates raised the behaviour (credit); negative: blame.
        """
        require_mine(self.state, self._problem.model)
        with session(self._run, self._problem, self.claim != BITWISE):
            observed = values_at(model_state(self._run), behaviour, self._problem)
            return observed - values_at((self.state, self.buffers), behaviour, self._problem)

    def save(self, path: str | Path) -> None:
        """Write parameters and buffers as one safetensors file, loadable into the model.

        Its metadata says, as JSON under ``"culpa"``, which run it came from (``root_digest``), what
        was left out (``without``: pairs of first update and first update after it), in which
        meaning, and the claim. Ranks that hold shards all call it, and the first one writes.
        """
        tensors = on_cpu(whole_on_first(self.state, self._problem.model) | self.buffers)
        facts = {
            "root_digest": self._run.root_digest,
            "without": _intervals(self.without),
            "counterfactual": self.counterfactual,
            "claim": self.claim,
        }
        # One key: with several, safetensors writes them in an order that varies.
        metadata = {"culpa": msgspec.json.encode(facts).decode()}
        plain = {n: v.contiguous() for n, v in tensors.items()}
        first_writes(lambda: write_durably(Path(path), save_tensors(plain, metadata=metadata)))


def _intervals(updates: Sequence[int]) -> list[tuple[int, int]]:
    """``(3, 4, 5, 9)`` -> ``[(3, 6), (9, 10)]``."""
    starts = [k for at, k in enumerate(updates) if at == 0 or updates[at - 1] != k - 1]
    stops = [k + 1 for at, k in enumerate(updates) if updates[at + 1 : at + 2] != (k + 1,)]
    return list(zip(starts, stops, strict=True))


def model_state(run: Run) -> tuple[Tree, Tree]:
    """Parameters and buffers of the model that the run ended with."""
    return run.final_state(), run.final_buffers()


def values_at(state: tuple[Tree, Tree], behaviour: Behaviour, problem: Problem) -> Tensor:
    """A behaviour's values, float64 [n], with the model's tensors set to ``state``.

    For use inside a ``session``, which puts the model's own tensors back.
    """
    engine = Engine(problem)
    engine.write(*state)
    return behaviour.values(problem.model)


def updates_of(run: Run, without: str | Iterable[int | str]) -> frozenset[int]:
    """The updates meant by a stage's name, an index, or an iterable of either.

    Raises:
        StageError: for an unknown stage, an index outside of the run, or anything else.
    """
    if not isinstance(without, (str, Iterable)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise StageError(
            "without= takes a stage's name, or a list of names and update indices; got"
            f" {without!r}. For one update write without=[{without!r}]."
        )
    if isinstance(without, str):
        return frozenset(run.stage(without).updates)
    found: set[int] = set()
    for item in without:
        if isinstance(item, str):
            found |= set(run.stage(item).updates)
        elif (
            isinstance(item, int)  # pyright: ignore[reportUnnecessaryIsInstance]
            and 0 <= item < run.num_steps
        ):
            found.add(item)
        else:
            raise StageError(
                f"without= names update {item!r}; the run has updates 0 to {run.num_steps - 1}."
            )
    return frozenset(found)


def replay(
    run: Run,
    problem: Problem,
    *,
    without: str | Iterable[int | str] = (),
    counterfactual: str = "skip",
    allow_drift: bool = False,
    progress: Progress | None = None,
) -> Counterfactual:
    """Re-run history without a stage or some updates: the proof of an attribution.

    Args:
        run: the recorded run.
        problem: the problem it was recorded with. Its model is borrowed and left as it was.
        without: a stage's name, update indices, or several of either. Empty: the run itself,
            whose every update is compared with the record bit for bit.
        counterfactual: ``"skip"``: at a removed update nothing happens, later updates keep their
            recorded learning rates. ``"restart"``: as skip, and the first update after a removed
            block starts from a fresh optimizer. ``"zero-gradient"``: the optimizer ticks with a
            gradient of zero.
        allow_drift: go on where the environment is not the recorded one or an update does not
            reproduce, and measure at the kept states how far the replay drifts from the record.
            A counterfactual that is not bitwise costs a replay of the observed updates besides.
        progress: see ``culpa.progress``.

    Returns:
        The counterfactual model. Each update that is executed uses the random numbers it drew in
        the observed run. Cost: the updates from the first removed one to the end, and those back
        to the nearest kept state; memory: one state.

    Raises:
        EnvironmentDifference: if this process differs from the recording one in what can change
            bits and cannot be set (an ``IntegrityError``, before any work).
        IntegrityError: if an update before the first removed one does not reproduce.
    """
    check_counterfactual(counterfactual)
    removed, progress = updates_of(run, without), progress or Silent()
    first = min(removed, default=0)
    at = run.kept_before(first)
    progress.start("replay", run.num_steps - at)
    try:
        with session(run, problem, allow_drift) as engine:
            updates = range(at, run.num_steps)
            if at in removed:  # no observed update is on the way to show that the loss is the one
                next(checked(run, engine, run.state(at), range(at, at + 1), Randomness()))
            engine.load(run.state(at))
            execute(run, engine, updates, removed, counterfactual, Randomness(), progress)
            state, executed = engine.state(), len(updates) - len(removed)
            if removed and not engine.fidelity.exact:
                progress.finish()
                executed += measure_drift(run, engine, at, progress)
    finally:
        progress.finish()
    return Counterfactual(
        run.frozen_parameters() | on_cpu(state.params),
        on_cpu(state.buffers),
        tuple(sorted(removed)),
        counterfactual,
        executed,
        engine.fidelity.claim,
        run,
        problem,
    )


def measure_drift(run: Run, engine: Engine, start: int, progress: Progress) -> int:
    """Compare the observed history from ``start`` on with the states that the record keeps.

    For numbers made off the record in a session that allows drift; ``start`` is a kept state's.
    Returns how many updates it executed; ``engine.fidelity`` has the outcome.
    """
    progress.start("measure drift", run.num_steps - start)
    for _ in checked(run, engine, run.state(start), range(start, run.num_steps), Randomness()):
        progress.advance()
    return run.num_steps - start


def execute(
    run: Run,
    engine: Engine,
    updates: range,
    removed: frozenset[int],
    counterfactual: str,
    randomness: Randomness,
    progress: Progress,
) -> None:
    """Carry the engine's state through ``updates``, the removed ones as ``replay`` defines them.

    Pieces of a history may be executed one by one, with the same ``randomness`` throughout. What
    was removed before ``updates`` begins belongs into ``removed`` too: history is compared with
    the record until the first removal, and no further.
    """
    observed = min(removed, default=run.num_steps) >= updates.start
    for record, batches, recorded in ahead(run, updates, removed):
        k = record.index
        if record.reset:
            engine.reset_optimizer()
        randoms = randomness.before(recorded, record)
        if k not in removed:
            if counterfactual == "restart" and k - 1 in removed:
                engine.reset_optimizer()
            engine.execute(record, batches, randoms, keep=False)
        else:
            observed = False
            if counterfactual == "zero-gradient":
                engine.tick(record)
            if (
                record.drew_randomness
                and k + 1 < run.num_steps
                and run.randoms_of(k + 1)[0] is None
            ):
                engine.advance_randomness(record, run.batches_of(k), randoms)
        randomness.after(randoms, record)
        if observed:
            check_step(run, engine, record, randomness)
        progress.advance()
