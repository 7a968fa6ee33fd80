"""Looking for a single culprit among thousands of updates, by replays: adaptive group testing.

Where first-order scores say nothing, three kinds of test are left, cheapest first.

1. Observe: gamma(s_b) - gamma(s_a) is exactly what leaving out the updates [a, b) would have
   changed *at once*. At the states that the run keeps it costs no update, and inside of a window
   the execution of that window only. What stands out from its surroundings is suspect.
2. Confirm: the most suspect single updates are left out and history is replayed to the end.
3. Group tests, if none of them did it: coarse windows are left out and replayed to the end, as far
   as the budget goes, and the one that matters most is split in halves until it is a single update
   (Dorfman, The detection of defective members of large populations, 1943; adaptively, as Hwang,
   A method for detecting all defective members in a population by group testing, JASA 1972).

What neither finds: two culprits that undo each other inside of one window that is never split, and
a culprit whose harm shows only later and vanishes in that of its window. Such a window looks
innocent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import numpy.typing as npt

from culpa.auditing.experiments import Experiments
from culpa.auditing.record import Spending, WindowFinding
from culpa.auditing.tasks import Task
from culpa.trajectory.replay import values_at
from culpa.trajectory.walk import forward, session

SOURCE = (
    "Dorfman, The detection of defective members of large populations, Annals of Mathematical "
    "Statistics 1943; Hwang, A method for detecting all defective members in a population by group "
    "testing, JASA 1972"
)
WATCHED = 0.25
"""At most this part of the budget goes into executing windows to see which update jumped."""
CONFIRMED = 3
"""So many of the most suspect updates are left out one at a time."""
COARSE = 8
"""Windows of the first round of group tests."""
NEAR = 16
"""Neighbours on each side that a jump is compared with."""
ACCOUNTS = 0.8
"""A half with this part of its parent's effect is followed without testing the other half."""


class Watched(msgspec.Struct, frozen=True):
    """Behaviours along the observed run: ``values[i][q]``."""

    values: list[list[float]]


@dataclass
class Search:
    """A search for updates that lowered (``side=-1``) or raised (``1``) some behaviour.

    Attributes:
        experiments: pays for everything.
        within: the updates to look at.
        side: of the effects looked for.
        windows: everything examined, in order.
        replays: made so far.
    """

    experiments: Experiments
    within: range
    side: int = -1
    windows: list[WindowFinding] = field(default_factory=list[WindowFinding])
    replays: int = 0

    def __post_init__(self) -> None:
        """Note the scale of every behaviour: what the updates looked at did to it altogether."""
        bench = self.experiments.bench
        self._width = len(bench.behaviours)
        self._scale = np.ones(self._width)

    def observe(self) -> list[int]:
        """Suspects by their jumps at once, most suspect first."""
        marks, values = self._at_kept_states()
        if len(marks) < 2:
            return []
        jumps = np.diff(values, axis=0)
        self._scale = np.maximum(np.abs(jumps).max(axis=0), 1e-300)
        allowed = WATCHED * self.experiments.left * self.experiments.bench.run.num_steps
        suspects: list[tuple[float, int]] = []
        for w in np.argsort(-self._excess(jumps)).tolist():
            start, stop = marks[w], marks[w + 1]
            allowed -= stop - start
            if allowed < 0:
                break
            inside = np.diff(np.vstack([values[w], self._watched(start, stop)]), axis=0)
            excess = self._excess(inside) if len(inside) > 2 else self._strength(inside)
            for at in np.argsort(-excess)[:CONFIRMED].tolist():
                suspects.append((float(excess[at]), start + at))
                self.windows.append(_window(start + at, start + at + 1, inside[at], None))
        return [k for excess, k in sorted(suspects, reverse=True) if excess > 0.0]

    def confirm(self, suspects: Sequence[int]) -> None:
        """Leave out suspects one at a time, as far as the budget goes."""
        for k in suspects[:CONFIRMED]:
            self._test(k, k + 1)

    def group_tests(self) -> None:
        """Leave out coarse windows and split the one that matters most, down to one update."""
        start, stop = self.within.start, self.within.stop
        count = min(COARSE, stop - start)
        edges = [start + (stop - start) * i // count for i in range(count + 1)]
        open_ones: list[tuple[float, int, int]] = []
        for a, b in reversed(list(itertools.pairwise(edges))):  # the later, the cheaper
            effect = self._test(a, b)
            if effect is not None:
                open_ones.append((effect, a, b))
        while open_ones:
            parent, a, b = open_ones.pop(open_ones.index(max(open_ones)))
            if b - a < 2 or parent <= 0.0:
                return
            middle = (a + b) // 2
            later = self._test(middle, b)
            if later is None:
                return
            open_ones.append((later, middle, b))
            if later >= ACCOUNTS * parent:
                continue
            earlier = self._test(a, middle)
            if earlier is None:
                return
            open_ones.append((earlier, a, middle))

    def culprits(self) -> list[WindowFinding]:
        """The single updates that were left out and had an effect to this side, strongest first."""
        tested = [w for w in self.windows if w.replayed is not None and w.stop - w.start == 1]
        strengths = [self._strength(np.array([w.replayed]))[0] for w in tested]
        order = sorted(range(len(tested)), key=lambda i: -strengths[i])
        return [tested[i] for i in order if strengths[i] > 0.0]

    def _test(self, start: int, stop: int) -> float | None:
        """The strength of the updates' effect; ``None`` if the budget does not pay for it."""
        task = Task(start=start, stop=stop)
        if not self.experiments.affords(task):
            return None
        what = f"replay without updates {start} to {stop - 1}"
        (outcome,) = self.experiments.run([(what, task)])
        self.replays += 1
        effects = np.array(outcome.effects)
        jumps = next((w.jumps for w in self.windows if (w.start, w.stop) == (start, stop)), None)
        shown = np.array(jumps) if jumps is not None else np.full(self._width, math.nan)
        self.windows.append(_window(start, stop, shown, outcome.effects))
        return float(self._strength(effects[None])[0])

    def _strength(self, effects: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """``[n, Q]`` -> ``[n]``: the largest effect to this side, in units of the scale."""
        return (self.side * effects / self._scale).max(axis=1)

    def _excess(self, jumps: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """How far each jump goes to this side beyond the typical one of its neighbours."""
        found = np.zeros(len(jumps))
        for i in range(len(jumps)):
            near = np.r_[jumps[max(0, i - NEAR) : i], jumps[i + 1 : i + 1 + NEAR]]
            usual = np.median(near, axis=0) if len(near) else np.zeros(jumps.shape[1])
            found[i] = self._strength((jumps[i] - usual)[None])[0]
        return found

    def _at_kept_states(self) -> tuple[list[int], npt.NDArray[np.float64]]:
        """Behaviours at the kept states in and around the updates looked at, ``[n, Q]``."""
        run, start, stop = self.experiments.bench.run, self.within.start, self.within.stop
        after = [k for k in run.kept_states if k >= stop][:1]
        first = run.kept_before(start)
        marks = [first, *(k for k in run.kept_states if first < k < stop), *after]
        rows = self.experiments.ledger.get(
            f"behaviours at {marks}", Watched, lambda: self._values_at(marks)
        )
        return marks, np.array(rows.values)

    def _values_at(self, marks: Sequence[int]) -> Watched:
        bench, frozen = self.experiments.bench, self.experiments.bench.run.frozen_parameters()
        rows: list[list[float]] = []
        with session(bench.run, bench.problem, bench.allow_drift):
            for k in marks:
                state = bench.run.state(k)
                at = (frozen | state.params, state.buffers)
                rows.append(
                    [float(values_at(at, b, bench.problem).mean()) for b in bench.behaviours]
                )
        return Watched(values=rows)

    def _watched(self, start: int, stop: int) -> npt.NDArray[np.float64]:
        """Behaviours after each of the observed updates, ``[stop - start, Q]``."""
        rows = self.experiments.ledger.get(
            f"watch {start} to {stop}", Watched, lambda: self._watch(start, stop)
        )
        spending = Spending(
            what=f"watched updates {start} to {stop - 1}", updates=stop - start, seconds=0.0
        )
        self.experiments.charge(spending)
        return np.array(rows.values)

    def _watch(self, start: int, stop: int) -> Watched:
        bench = self.experiments.bench
        rows: list[list[float]] = []
        with session(bench.run, bench.problem, bench.allow_drift) as engine:
            for transition in forward(bench.run, engine, start, stop):
                del transition
                model = bench.problem.model
                rows.append([float(b.values(model).mean()) for b in bench.behaviours])
        return Watched(values=rows)


def _window(
    start: int, stop: int, jumps: npt.NDArray[np.float64], replayed: list[float] | None
) -> WindowFinding:
    return WindowFinding(start=start, stop=stop, jumps=jumps.tolist(), replayed=replayed)
