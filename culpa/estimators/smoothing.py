"""Smoothing a sweep over trajectories: for training where single sweeps explode.

In chaotic training the derivative along the one observed trajectory is dominated by a few updates
at which the adjoint happened to grow; it is right, for disturbances so small that they mean
nothing, and far off for one as large as an update. The same derivative along trajectories that
start a little elsewhere has other such updates. What they have in common is the effect at the scale
of the disturbance, and how far they disagree tells how well it is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from culpa.errors import OptionError
from culpa.trajectory.compared import Randomness
from culpa.trajectory.engine import Engine
from culpa.trajectory.run import Run
from culpa.trajectory.state import State
from culpa.trajectory.walk import Transition, onward


@dataclass(frozen=True)
class Smoothing:
    """Score along several slightly perturbed trajectories too, and take the median of the scores.

    The median, since where sweeps explode a mean is that of the worst of them. ``Scores.spread``
    then tells how far the trajectories disagree; what all of them have wrong, such as what a
    propagator leaves out, is not in it (docs/results/smoothing.md).

    Args:
        trajectories: besides the observed one; each costs what the observed one costs, and one
            replay more.
        relative: the size of the perturbation of the initial parameters: independent normal noise
            on each tensor, in units of the root mean square of its entries.
        seed: of the noise.
    """

    trajectories: int = 4
    relative: float = 0.03
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if isinstance(self.trajectories, bool) or self.trajectories < 1:
            raise OptionError(
                "Smoothing(trajectories=...) takes an integer >= 1, the perturbed trajectories"
                f" besides the observed one; got {self.trajectories!r}."
            )
        if not 0.0 <= self.relative < math.inf:
            raise OptionError(
                "Smoothing(relative=...) takes a finite number >= 0, the noise relative to the"
                f" parameters; got {self.relative!r}."
            )

    def starts(self, run: Run) -> Iterator[State]:
        """The perturbed initial states, ``trajectories`` of them."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.trajectories):
            state = run.state(0)
            params = {n: self._perturbed(p, generator) for n, p in state.params.items()}
            yield State(params, state.buffers, state.slots)

    def _perturbed(self, value: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        size = value.double().square().mean().sqrt() if value.numel() else torch.zeros(())
        added = self.relative * size * noise.to(value.device)
        return (value.double() + added).to(value.dtype)


class Trajectory:
    """The recorded updates executed from another initial state; nothing is compared.

    Attributes:
        final: the state they end with.
        boundaries: the updates before which the state is held in memory.

    Cost: one replay here and one in ``backward``. Memory: about 2 sqrt(K) states.
    """

    def __init__(self, run: Run, engine: Engine, start: State) -> None:
        self._run, self._engine = run, engine
        length = max(1, math.isqrt(run.num_steps))
        self.boundaries = range(0, run.num_steps, length)
        self._parts = [range(low, min(low + length, run.num_steps)) for low in self.boundaries]
        self._held: list[tuple[State, Randomness]] = []
        state, randomness = start, Randomness()
        for part in self._parts:
            self._held.append((state, copy(randomness)))
            for transition in onward(run, engine, state, part, randomness):
                state = transition.after
        self.final = state

    def backward(self) -> Iterator[Transition]:
        """Its updates from the last to the first, recomputed segment by segment."""
        for part, (state, randomness) in zip(
            reversed(self._parts), reversed(self._held), strict=True
        ):
            again = onward(self._run, self._engine, state, part, copy(randomness))
            yield from reversed(list(again))


def summarise(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The median over trajectories, and the spread of one trajectory about it.

    Args:
        scores: float64 ``[trajectories, ...]``.

    Returns:
        Both ``[...]``. The spread is 1.4826 times the median absolute deviation, which is the
        standard deviation of normal numbers and does not mind a few trajectories that explode.
    """
    middle = scores.quantile(0.5, dim=0)
    return middle, 1.4826 * (scores - middle).abs().quantile(0.5, dim=0)
