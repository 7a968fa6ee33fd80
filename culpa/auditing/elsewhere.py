"""A task in another process: what it takes along, and the bench that is set up there once.

A module and its data cannot be sent about in general, and need not be: both are built there, by the
function that builds them on the command line (``--problem module:function``), and the run is opened
where it lies. That the process then judges the very same thing is checked, not assumed: the values
of all behaviours must be those of the process that asks, to the last bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
from blake3 import blake3

from culpa.auditing.tasks import Bench, Outcome, Task
from culpa.behaviour import Behaviour
from culpa.errors import OptionError
from culpa.problem import Problem
from culpa.trajectory.run import open_run

Make = Callable[[], tuple[Problem, Sequence[Behaviour]]]
"""Builds the problem and the behaviours: an importable function without arguments."""
_benches: dict[tuple[str, str], Bench] = {}


@dataclass(frozen=True)
class Case:
    """What a task needs to run elsewhere: where the run is, and what is judged, in a few words."""

    path: str
    make: Make
    counterfactual: str
    allow_drift: bool
    digest: str

    @classmethod
    def of(cls, bench: Bench, make: Make) -> Case:
        """That of a bench here."""
        where = bench.run.source.where
        path = where if "://" in where else os.path.realpath(where)
        return cls(path, make, bench.counterfactual, bench.allow_drift, digest(bench))


def digest(bench: Bench) -> str:
    """Of all that a task's outcome depends on."""
    return blake3(msgspec.json.encode(bench.identity())).hexdigest()


def execute(case: Case, task: Task) -> Outcome:
    """Run a task in this process, on a bench that later tasks of the case find here.

    Raises:
        OptionError: if what ``case.make`` builds here is not what is judged there.
        and whatever the replay raises.
    """
    key = (case.digest, _name(case.make))
    bench = _benches.get(key)
    if bench is None:
        problem, behaviours = case.make()
        bench = Bench(
            open_run(case.path),
            problem,
            behaviours,
            counterfactual=case.counterfactual,
            allow_drift=case.allow_drift,
            progress=None,
        )
        if digest(bench) != case.digest:
            raise OptionError(
                f"{_name(case.make)} builds another problem or other behaviours in a worker than"
                " the audit was given: their values at the end of training differ. Give the audit"
                " what the same function returns, and let it build the same every time (seeds,"
                " files); where the machines differ, audit with allow_drift=True on one of them."
            )
        _benches.clear()  # of another audit, which holds a model and its data
        _benches[key] = bench
    return bench(task)


def _name(make: Make) -> str:
    return getattr(make, "__qualname__", None) or repr(make)
