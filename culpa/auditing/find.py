"""``culpa.find_updates``: a single culprit among thousands of updates, by few replays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from culpa.auditing.experiments import Experiments
from culpa.auditing.ledger import Ledger
from culpa.auditing.record import WindowFinding
from culpa.auditing.search import Search
from culpa.auditing.tasks import Bench, Executor, Serial
from culpa.behaviour import Behaviour
from culpa.errors import OptionError
from culpa.problem import Problem
from culpa.progress import Progress
from culpa.trajectory.replay import check_counterfactual
from culpa.trajectory.run import Run

SIDES = {"lowered": -1, "raised": 1}


@dataclass(frozen=True)
class FoundUpdates:
    """What a search for single updates found.

    Attributes:
        culprits: the single updates that were left out, replayed to the end of training and had an
            effect to the side looked for, strongest first; ``replayed`` holds their true effects.
        windows: everything examined, in order.
        replays: made to the end of training.
        used: spent altogether, in trainings.
    """

    culprits: tuple[WindowFinding, ...]
    windows: tuple[WindowFinding, ...]
    replays: int
    used: float


def find_updates(
    run: Run,
    problem: Problem,
    behaviours: Sequence[Behaviour],
    *,
    within: range | None = None,
    side: str = "lowered",
    budget: float = 1.0,
    observe: bool = True,
    counterfactual: str = "skip",
    allow_drift: bool = False,
    work: str | Path | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> FoundUpdates:
    """Look for single updates that changed a behaviour, without any derivative.

    Watches the behaviours along the observed run, which is cheap, leaves the updates that stand
    out there out one at a time and replays to the end of training. If none of them did it, coarse
    windows are left out and the one that matters is split, as far as the budget goes
    (auditing/search.py says how, and what a search cannot find: culprits that mask each other).

    Args:
        run, problem: as for ``culpa.replay``.
        behaviours: evaluated only; they need not be differentiable.
        within: the updates to look at; default all.
        side: ``"lowered"`` a behaviour or ``"raised"`` it.
        budget: how much to spend, in units of the run's own training cost. A replay from the middle
            of the run costs a half.
        observe: watch the run first. Without it, group tests alone: about 2 log2 K replays.
        counterfactual, allow_drift: see ``culpa.replay``.
        work, executor, progress: see ``culpa.audit``.

    Raises:
        OptionError: for an unknown side, a negative budget, or updates outside of the run.
    """
    check_counterfactual(counterfactual)
    updates = range(run.num_steps) if within is None else within
    inside = len(updates) and updates.start >= 0 and updates.stop <= run.num_steps
    if side not in SIDES or not budget >= 0 or not inside or updates.step != 1:
        raise OptionError(
            f"find_updates takes side 'lowered' or 'raised', a budget >= 0 and a range of updates"
            f" of this run (0 to {run.num_steps - 1}); got {side=}, {budget=}, {within=}."
        )
    if isinstance(behaviours, Behaviour) or not behaviours:
        raise OptionError(f"find_updates needs a list of behaviours, got {behaviours!r}.")
    bench = Bench(
        run,
        problem,
        behaviours,
        counterfactual=counterfactual,
        allow_drift=allow_drift,
        progress=progress,
    )
    ledger = Ledger(None if work is None else Path(work), bench.identity())
    search = Search(Experiments(bench, ledger, executor or Serial(), budget), updates, SIDES[side])
    if observe:
        search.confirm(search.observe())
    if not search.culprits():
        search.group_tests()
    return FoundUpdates(
        tuple(search.culprits()), tuple(search.windows), search.replays, search.experiments.used
    )
