"""The ranking of the stages as it stands: best numbers, intervals, noise floor, open contests."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from culpa.auditing.contest import Known, contest, settled, urgency
from culpa.auditing.experiments import Experiments
from culpa.auditing.floor import MOST, ROUNDING, SHARE, floor_at, hidden, stands_for, student
from culpa.auditing.intervals import Estimate, half_widths
from culpa.auditing.screen import Screened, number
from culpa.auditing.tasks import Outcome, Task
from culpa.estimators.trust import NOT_IDENTIFIED

REPLAYED = "replayed"
"""The grade of an effect that was replayed and stands out from the noise floor."""


@dataclass(frozen=True)
class Ranking:
    """Per stage and behaviour, as the record has them, and what is still open.

    Attributes:
        intervals, floors: half-widths; nan where unknown.
        grades: of the best numbers.
        urgency: what a replay of each stage would be worth; empty when nothing is open.
        settled: per behaviour.
        blamed: the stages that lowered a behaviour most, one entry a behaviour that has one.
    """

    intervals: dict[str, list[float]]
    floors: dict[str, list[float]]
    grades: dict[str, list[str]]
    urgency: dict[str, float]
    settled: list[bool]
    blamed: list[str]


def rank(
    experiments: Experiments,
    found: Mapping[str, Estimate],
    truths: Mapping[str, Outcome],
    removals: Mapping[str, Task],
) -> Ranking:
    """The ranking, given the estimates, the replays and the placebos made so far."""
    width, names = len(experiments.bench.behaviours), list(removals)
    intervals: dict[str, list[float]] = {name: [] for name in names}
    floors: dict[str, list[float]] = {name: [] for name in names}
    grades: dict[str, list[str]] = {name: [] for name in names}
    known: list[dict[str, Known]] = []
    blamed: list[str] = []
    for q in range(width):
        of_stage: dict[str, Known] = {}
        halves = half_widths(found, {n: t.effects for n, t in truths.items()}, q)
        for name in names:
            # Nothing follows the last stage, so nothing amplifies a disturbance after it.
            last = removals[name].stop == experiments.bench.run.num_steps
            placebos, moment = experiments.placebos, removals[name].stop
            floor = 0.0 if last else floor_at(placebos, moment, q, experiments.bench.run.num_steps)
            replayed = name in truths
            value = truths[name].effects[q] if replayed else found[name].effects[q]
            half = (0.0 if replayed else halves[name]) + (0.0 if math.isnan(floor) else floor)
            if math.isinf(half) or not math.isfinite(value):
                # An estimate that is not identified leads no contest and widens no spread.
                value, half = 0.0, math.inf
            of_stage[name] = Known(value, half, replayed)
            unknown = math.isinf(half) or (replayed and math.isnan(floor))
            intervals[name].append(math.nan if unknown else half)
            floors[name].append(floor)
            grades[name].append(
                NOT_IDENTIFIED
                if hidden(value, floor)
                else (REPLAYED if replayed else found[name].grade)
            )
        known.append(of_stage)
        leader = contest(of_stage, -1).leader
        blamed += [leader] if leader is not None and leader not in blamed else []
    return Ranking(intervals, floors, grades, urgency(known), [settled(k) for k in known], blamed)


def first_placebo(experiments: Experiments, removals: Mapping[str, Task]) -> None:
    """One rounding placebo at the earliest end of a stage that its share of the budget pays for.

    More than the share is spent if the rest still pays for every replay. Where no stage ends late
    enough the earliest kept state that is affordable is taken.
    """
    run = experiments.bench.run
    spare = experiments.left - experiments.price(*removals.values())
    allowed = max(SHARE * experiments.left, spare)
    ends = sorted({task.stop for task in removals.values() if task.stop < run.num_steps})
    if not ends:
        return
    for at in (*ends, *(k for k in run.kept_states if ends[0] < k < run.num_steps)):
        price = experiments.price(Task(start=at, stop=at))
        useful = any(stands_for(at, moment, run.num_steps) for moment in ends)
        if useful and price <= allowed and experiments.affords(Task(start=at, stop=at)):
            experiments.placebo(at)
            return


def chaos(
    experiments: Experiments,
    found: Mapping[str, Estimate],
    truths: Mapping[str, Outcome],
    removals: Mapping[str, Task],
    ranking: Ranking,
) -> Ranking:
    """More placebos where effects lie inside of the floor, as far as the budget goes.

    The floor of one placebo is 12.7 times it, of two 4.3 times: a few more may show that an effect
    stands out after all. Effects that lie inside of five placebos' plain size are left there.
    """
    run = experiments.bench.run
    while True:
        moments = sorted(
            {
                removals[name].stop
                for name in removals
                for q, floor in enumerate(ranking.floors[name])
                if name in truths and _may_stand_out(truths[name].effects[q], floor, experiments)
            }
        )
        for at in moments:
            made = _made(experiments, at)
            if at < run.num_steps and made < MOST and experiments.affords(Task(start=at, stop=at)):
                experiments.placebo(at)
                break
        else:
            return ranking
        ranking = rank(experiments, found, truths, removals)


def _may_stand_out(effect: float, floor: float, experiments: Experiments) -> bool:
    """Whether an effect inside of the floor would be outside of that of ``MOST`` such placebos."""
    made = max((_made(experiments, p.at) for p in experiments.placebos), default=1)
    return hidden(effect, floor) and abs(effect) > floor * student(MOST) / student(made)


def _made(experiments: Experiments, at: int) -> int:
    return sum(p.kind == ROUNDING and p.at == at for p in experiments.placebos)


def neutral_update(experiments: Experiments, screened: Screened, budget: float) -> None:
    """Skip the update with the smallest scores that what is left of the placebos' share pays for.

    The smallest by its largest part of what all updates did to a behaviour; identified ones only.
    """
    rows = [[number(v) for v in row] for row in screened.steps]
    width = len(experiments.bench.behaviours)
    totals = [sum(abs(row[q]) for row in rows) or 1.0 for q in range(width)]
    candidates = [
        (max(abs(row[q]) / totals[q] for q in range(width)), k)
        for k, row in enumerate(rows)
        if screened.grades[k] != NOT_IDENTIFIED and k + 1 < len(rows)
    ]
    for size, k in sorted(candidates):
        task = Task(start=k, stop=k + 1)
        cheap = experiments.price(task) <= SHARE * budget and experiments.affords(task)
        if math.isfinite(size) and cheap:
            experiments.neutral(k, rows[k])
            return
