"""The budget of an audit and what it buys: tasks run, kept, charged and accounted for."""

from __future__ import annotations

from collections.abc import Sequence

from culpa.auditing.floor import NEUTRAL, ROUNDING
from culpa.auditing.ledger import Ledger
from culpa.auditing.prices import price
from culpa.auditing.record import PlaceboFinding, Spending
from culpa.auditing.tasks import Bench, Executor, Outcome, Task

ROUNDING_ERROR = 1e-9
"""Sums of costs may exceed the budget by this."""


class Experiments:
    """Runs tasks while the budget lasts.

    Args:
        bench: what the tasks have in common.
        ledger: where results are kept; a kept result is charged as if it had been computed, so
            that a resumed audit decides as an uninterrupted one.
        executor: runs the tasks that have no kept result.
        budget: in trainings.
    """

    def __init__(self, bench: Bench, ledger: Ledger, executor: Executor, budget: float) -> None:
        self.bench = bench
        self.ledger = ledger
        self.executor = executor
        self.budget = self.left = budget
        self.used = 0.0
        self.spent: list[Spending] = []
        self.claims: list[str] = []
        self.placebos: list[PlaceboFinding] = []

    def affords(self, *tasks: Task) -> bool:
        """Whether the budget pays for all of these; no budget, not even for what costs nothing."""
        return self.left + self.used > 0.0 and self.price(*tasks) <= self.left + ROUNDING_ERROR

    def price(self, *tasks: Task) -> float:
        """What these cost, in trainings."""
        return sum(price(self.bench.run, task.start, task.stop) for task in tasks)

    def run(self, tasks: Sequence[tuple[str, Task]]) -> list[Outcome]:
        """Execute tasks, each with the words that the accounts use for it."""
        wanted = [task for _, task in tasks if task.name not in self.ledger]
        fresh = iter(self.executor.map(self.bench, wanted))
        found: list[Outcome] = []
        for what, task in tasks:
            outcome = self.ledger.get(task.name, Outcome, lambda: next(fresh))
            self._charge(what, task, outcome)
            found.append(outcome)
        return found

    def placebo(self, at: int) -> None:
        """One more rounding placebo before update ``at``."""
        seed = sum(p.kind == ROUNDING and p.at == at for p in self.placebos)
        task = Task(start=at, stop=at, seed=seed)
        (outcome,) = self.run([(f"placebo: rounding noise before update {at}", task)])
        self.placebos.append(PlaceboFinding(kind=ROUNDING, at=at, effects=outcome.effects))

    def neutral(self, k: int, scores: Sequence[float]) -> None:
        """Skip update k, whose effects are as good as nothing; its ``scores`` are subtracted."""
        what = f"placebo: skip update {k}, which has next to no score"
        (outcome,) = self.run([(what, Task(start=k, stop=k + 1))])
        effects = [e - s for e, s in zip(outcome.effects, scores, strict=True)]
        self.placebos.append(PlaceboFinding(kind=NEUTRAL, at=k, effects=effects))

    def charge(self, spending: Spending) -> None:
        """Account for updates executed otherwise than by a task."""
        paid = spending.updates / self.bench.run.num_steps
        self.left -= paid
        self.used += paid
        self.spent.append(spending)

    def _charge(self, what: str, task: Task, outcome: Outcome) -> None:
        paid = self.price(task)
        self.left -= paid
        self.used += paid
        self.claims.append(outcome.claim)
        self.spent.append(Spending(what=what, updates=outcome.updates, seconds=outcome.seconds))
