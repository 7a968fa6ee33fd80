"""The audit: first-order scores screen everything, replays prove the few that matter."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from culpa._version import __version__
from culpa.auditing import findings
from culpa.auditing.again import CHOSEN
from culpa.auditing.contest import most_urgent_first
from culpa.auditing.experiments import Experiments
from culpa.auditing.intervals import Estimate
from culpa.auditing.ledger import Ledger
from culpa.auditing.prices import replaying_costs_less
from culpa.auditing.ranking import Ranking, chaos, first_placebo, neutral_update, rank
from culpa.auditing.record import AuditRecord
from culpa.auditing.screen import (
    Embedded,
    Screened,
    embed_stages,
    estimates,
    number,
    screen,
    sums,
)
from culpa.auditing.search import Search
from culpa.auditing.segments import segments_of
from culpa.auditing.tasks import Bench, Executor, Outcome, Serial, Task
from culpa.behaviour import Behaviour
from culpa.dynamics.propagator import Propagator
from culpa.errors import OptionError, StageError, UnsupportedError
from culpa.estimators.trust import NOT_IDENTIFIED
from culpa.problem import Problem
from culpa.progress import Progress
from culpa.trajectory.replay import check_counterfactual
from culpa.trajectory.run import Run
from culpa.trajectory.staging import UNNAMED

FEW = 8
"""Stages of fewer updates are not searched for single ones."""


@dataclass(frozen=True)
class Options:
    """What an audit was asked for, besides the run, the problem and the behaviours."""

    budget: float = 1.0
    counterfactual: str = "skip"
    propagator: Propagator | None = None
    allow_drift: bool = False

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        check_counterfactual(self.counterfactual)
        if not self.budget >= 0:
            raise OptionError(
                f"budget is a number of trainings to spend on replays, >= 0; got {self.budget}."
            )


def judge(
    run: Run,
    problem: Problem,
    behaviours: Sequence[Behaviour],
    options: Options,
    *,
    work: Path | None = None,
    executor: Executor | None = None,
    progress: Progress | None = None,
) -> AuditRecord:
    """Find out which stages are to be credited or blamed. See ``culpa.audit``."""
    if not run.stages:
        raise StageError(f"{run.path} has no stages to audit.")
    _check(behaviours)
    bench = Bench(
        run,
        problem,
        behaviours,
        counterfactual=options.counterfactual,
        allow_drift=options.allow_drift,
        progress=progress,
    )
    ledger = Ledger(work, bench.identity() | {"propagator": repr(options.propagator)})
    screened = ledger.get(
        "scores of every update", Screened, lambda: screen(bench, options.propagator)
    )
    cut, notes = _with_stages(run, screened)
    bench.run = cut
    experiments = Experiments(bench, ledger, executor or Serial(), options.budget)
    removals = {s.name: Task(start=s.start, stop=s.stop, drill=True) for s in cut.stages}
    first_placebo(experiments, removals)
    embedded: Embedded | None = None
    truths: dict[str, Outcome] = {}
    if _replaying_all_is_cheaper(experiments, removals, options.propagator):
        found = sums(screened, cut.stages, len(behaviours))
        told = [(f"replay without stage {name!r}", task) for name, task in removals.items()]
        truths = dict(zip(removals, experiments.run(told), strict=True))
        ranking = rank(experiments, found, truths, removals)
        stopped = "every stage was replayed, which took less than estimating them"
    else:
        embedded = ledger.get(
            "embeddings", Embedded, lambda: embed_stages(bench, options.propagator)
        )
        refused = embedded.refused
        found = (
            sums(screened, cut.stages, len(behaviours))
            if refused
            else estimates(embedded, cut.stages)
        )
        ranking, stopped = _prove(experiments, found, truths, removals)
    ranking = chaos(experiments, found, truths, removals, ranking)
    search = _search(experiments, screened, truths, ranking)
    neutral_update(experiments, screened, options.budget)
    return findings.record(
        experiments,
        screened=screened,
        embedded=embedded,
        estimates=found,
        truths=truths,
        ranking=ranking,
        search=search,
        stopped=stopped,
        notes=notes,
        options={
            "budget": f"{options.budget:g} trainings",
            "propagator": CHOSEN if options.propagator is None else repr(options.propagator),
            "allow_drift": str(options.allow_drift),
        },
        version=__version__,
    )


def _check(behaviours: Sequence[Behaviour]) -> None:
    if isinstance(behaviours, Behaviour) or not behaviours:
        raise OptionError(f"audit needs a list of behaviours, got {behaviours!r}.")
    names = [b.name for b in behaviours]
    if len(set(names)) != len(names):
        raise OptionError(
            f"the behaviours' names must differ, got {names}: a table is labelled with them."
        )


def _with_stages(run: Run, screened: Screened) -> tuple[Run, list[str]]:
    """The run cut into stages: its own or, where none were named, those that its scores show."""
    named = [stage.name for stage in run.stages] != [UNNAMED]
    if named or not screened.steps:
        return run, []
    steps = np.array([[number(v) for v in row] for row in screened.steps])
    try:
        stages = segments_of(steps)
    except UnsupportedError as error:
        return run, [f"The run names no stages, and none were looked for: {error}"]
    if len(stages) < 2:
        return run, ["The run names no stages, and its scores show none: it is judged as a whole."]
    cut = copy.copy(run)
    cut.stages = stages
    return cut, [
        f"The run names no stages. Its {len(stages)} stages here were found where the scores of"
        " its updates change; their borders are estimates."
    ]


def _replaying_all_is_cheaper(
    experiments: Experiments, removals: dict[str, Task], propagator: Propagator | None
) -> bool:
    """Whether the budget pays for all replays and an embedding of all stages would cost more."""
    replays = experiments.price(*removals.values())
    stops = [task.stop for task in removals.values()]
    return experiments.affords(*removals.values()) and replaying_costs_less(
        experiments.bench.run, stops, replays, propagator
    )


def _prove(
    experiments: Experiments,
    found: dict[str, Estimate],
    truths: dict[str, Outcome],
    removals: dict[str, Task],
) -> tuple[Ranking, str]:
    """Replay the most urgent stage, again and again; the ranking, and why it stopped."""
    prices = {name: experiments.price(task) for name, task in removals.items()}
    while True:
        ranking = rank(experiments, found, truths, removals)
        wanted = most_urgent_first(ranking.urgency, prices, experiments.left)
        if not wanted:
            if all(ranking.settled):
                return (
                    ranking,
                    "the ranking is settled: at 95 % no other stage can take first place",
                )
            return ranking, "stages that are tied for first place differ by less than chaos does"
        affordable = [name for name in wanted if experiments.affords(removals[name])]
        if not affordable:
            cheapest = min(prices[name] for name in wanted)
            return ranking, (
                f"the budget was used up: {experiments.left:.2f} trainings left, and the cheapest"
                f" replay still worth making costs {cheapest:.2f}"
            )
        name = affordable[0]
        told = [(f"replay without stage {name!r}", removals[name])]
        (truths[name],) = experiments.run(told)


def _search(
    experiments: Experiments, screened: Screened, truths: dict[str, Outcome], ranking: Ranking
) -> Search | None:
    """Look for single culprits where the updates of a blamed stage are not identified."""
    run, grades = experiments.bench.run, screened.grades
    for name in ranking.blamed:
        stage = run.stage(name)
        lost = [k for k in stage.updates if not grades or grades[k] == NOT_IDENTIFIED]
        if name not in truths or len(lost) < 0.5 * len(stage) or len(stage) < FEW:
            continue
        search = Search(experiments, stage.updates)
        search.confirm(search.observe())
        if not search.culprits():
            search.group_tests()
        return search
    return None
