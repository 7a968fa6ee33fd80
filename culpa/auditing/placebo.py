"""The noise floor: how far a behaviour moves when training is disturbed by next to nothing."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from culpa.behaviour import Behaviour
from culpa.errors import OptionError
from culpa.problem import Problem
from culpa.progress import Progress, Silent
from culpa.trajectory.compared import Randomness
from culpa.trajectory.engine import Engine
from culpa.trajectory.fidelity import BITWISE
from culpa.trajectory.replay import execute, measure_drift, values_at
from culpa.trajectory.run import Run
from culpa.trajectory.state import State
from culpa.trajectory.walk import forward, session
from culpa.tree import Tree

NOT_THE_RECORD = frozenset({-1})
"""As if something before the run had been removed: what follows is not compared with the record."""


@dataclass(frozen=True)
class NoiseFloor:
    """Placebo effects: of a disturbance that means nothing, at the same moment.

    Attributes:
        effects: float64 ``[repeats, behaviours]``: observed minus disturbed mean of the behaviour.
        at: the update before which training was disturbed.
        size: the relative size of the disturbance.
        claim: ``"bitwise"``, or the drift of a replay here from the record, which the effects then
            hold too, as those of ``culpa.replay(allow_drift=True)`` do.
    """

    effects: Float64[Tensor, "repeats behaviours"]
    at: int
    size: float
    claim: str = BITWISE

    @property
    def spread(self) -> Float64[Tensor, " behaviours"]:
        """The root mean square placebo effect; an effect inside of twice that is chaos."""
        return self.effects.square().mean(0).sqrt()

    def hides(self, effects: Float64[Tensor, " behaviours"]) -> list[bool]:
        """For each behaviour whether its effect cannot be told from the placebo's."""
        return (effects.abs() <= 2 * self.spread).tolist()


def noise_floor(
    run: Run,
    problem: Problem,
    behaviours: Sequence[Behaviour],
    *,
    at: int = 0,
    repeats: int = 3,
    size: float | None = None,
    seed: int = 0,
    allow_drift: bool = False,
    progress: Progress | None = None,
) -> NoiseFloor:
    """Disturb the parameters before update ``at`` by rounding-sized noise and replay the rest.

    In chaotic training the smallest disturbance re-draws the rest of the run. An effect of a stage
    or an update that is no larger than this spread says nothing about the stage.

    Args:
        run, problem, behaviours: as for ``culpa.attribute``; behaviours are evaluated only.
        at: the update to disturb, such as the first of a stage.
        repeats: independent disturbances.
        size: relative to each parameter; default: the rounding of its dtype.
        seed: of the noise.
        allow_drift: measure what does not reproduce instead of refusing it; see ``culpa.replay``.
            Where it is not bitwise this costs one more replay.
        progress: see ``culpa.progress``.

    Returns:
        The placebo effects. Cost: ``repeats`` replays of the updates from ``at`` on, and one of
        those back to the nearest kept state.

    Raises:
        OptionError: for an update outside of the run or fewer than one repeat.
        EnvironmentDifference: if a replay here need not be bitwise.
        IntegrityError: if an update before ``at`` (or, without one to execute, ``at`` itself) does
            not reproduce.
    """
    if not 0 <= at < run.num_steps or repeats < 1:
        raise OptionError(
            f"noise_floor takes an update from 0 to {run.num_steps - 1} and at least one repeat;"
            f" got at={at} and repeats={repeats}."
        )
    watch, generator = progress or Silent(), torch.Generator().manual_seed(seed)
    rows: list[list[float]] = []
    watch.start("placebo", repeats * (run.num_steps - at))
    try:
        with session(run, problem, allow_drift) as engine:
            kept, randomness = run.kept_before(at), Randomness()
            if at == kept:  # no observed update is on the way to show that the loss is the one
                next(forward(run, engine, at, at + 1))
            engine.load(run.state(kept))
            execute(run, engine, range(kept, at), frozenset(), "skip", randomness, Silent())
            start = engine.state()
            observed = _means(engine, problem, behaviours, run.final_state(), run.final_buffers())
            for _ in range(repeats):
                params = {n: _disturbed(p, size, generator) for n, p in start.params.items()}
                engine.load(State(params, start.buffers, start.slots))
                updates = range(at, run.num_steps)
                again = copy(randomness)  # every repeat draws what the observed run drew
                execute(run, engine, updates, NOT_THE_RECORD, "skip", again, watch)
                state = engine.state()
                ended = _means(engine, problem, behaviours, state.params, state.buffers)
                rows.append([o - e for o, e in zip(observed, ended, strict=True)])
            if not engine.fidelity.exact:
                watch.finish()
                measure_drift(run, engine, kept, watch)
    finally:
        watch.finish()
    sizes = [torch.finfo(p.dtype).eps for p in start.params.values()]
    effects = torch.tensor(rows, dtype=torch.float64)
    largest = max(sizes, default=0.0) if size is None else size
    return NoiseFloor(effects, at, largest, engine.fidelity.claim)


def _disturbed(value: Tensor, size: float | None, generator: torch.Generator) -> Tensor:
    relative = torch.finfo(value.dtype).eps if size is None else size
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return value + (value.double() * noise.to(value.device) * relative).to(value.dtype)


def _means(
    engine: Engine, problem: Problem, behaviours: Sequence[Behaviour], params: Tree, buffers: Tree
) -> list[float]:
    state = engine.state()
    means = [float(values_at((params, buffers), b, problem).mean()) for b in behaviours]
    engine.load(state)
    return means
