"""Proving that a run is what was recorded: every byte that matters, or every update again."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from culpa.errors import IntegrityError, OptionError
from culpa.problem import Problem
from culpa.progress import Progress, Silent
from culpa.trajectory.compared import Randomness
from culpa.trajectory.integrity import check_digests
from culpa.trajectory.run import Run
from culpa.trajectory.state import State
from culpa.trajectory.walk import checked, session

LEVELS = ("digest", "replay")


@dataclass(frozen=True)
class Verified:
    """What a verification has checked; it raises otherwise.

    Attributes:
        finished: whether the run was closed. One that crashed has no root digest: its updates,
            rows and states are as recorded, but nothing says how many there had been.
        root_digest: of a finished run.
        updates, states, examples: how many; ``examples`` is 0 where the rows were not at hand.
        bytes_hashed: of states and examples.
        executed: how many updates were executed again and gave the recorded bits.
    """

    finished: bool
    root_digest: str
    updates: int
    states: int
    examples: int
    bytes_hashed: int
    executed: int

    def __str__(self) -> str:
        what = f"{self.updates} updates, {self.states} states, {self.examples} examples"
        again = f"; {self.executed} updates executed again, bit for bit" if self.executed else ""
        root = f"root digest {self.root_digest}" if self.finished else "UNFINISHED: no root digest"
        return f"{what}{again}; {root}"


def verify_run(
    run: Run,
    problem: Problem | None,
    level: str,
    progress: Progress | None,
    sample: int | None,
    root_digest: str | None,
) -> Verified:
    """See ``Run.verify``."""
    if level not in LEVELS:
        raise OptionError(f"level must be one of {', '.join(map(repr, LEVELS))}, got {level!r}.")
    if level == "replay" and problem is None:
        raise OptionError("verify(level='replay') executes the training again: pass the problem.")
    if sample is not None and (level != "replay" or sample < 1):
        raise OptionError(f"sample= is a number of segments for level='replay', got {sample}.")
    hashed, examples = check_digests(run)
    if root_digest is not None and root_digest.lower() != run.root_digest:
        begins = [j.stop for j in run.manifest.earlier if j.root_digest == root_digest.lower()]
        raise IntegrityError(
            f"{run.source.where} is whole, but not the run quoted: its root digest is"
            f" {run.root_digest or 'none (unfinished)'}, expected {root_digest}"
            + (f", which is that of its first {begins[0]} updates." if begins else ".")
        )
    executed = 0
    if problem is not None and level == "replay":
        executed = _replay(run, problem, progress or Silent(), sample)
    return Verified(
        run.manifest.finished,
        run.root_digest,
        run.num_steps,
        len(run.kept_states),
        examples,
        hashed,
        executed,
    )


def _replay(run: Run, problem: Problem, progress: Progress, sample: int | None) -> int:
    """Execute the segments between kept states, all or some; how many updates that were."""
    segments = _segments(run)
    if sample is not None and sample < len(segments):
        # Not a generator that a forger could foresee, nor one that training draws from.
        segments = sorted(random.SystemRandom().sample(segments, sample))
    count = sum(stop - start for start, stop in segments)
    progress.start("verify", count)
    try:
        with session(run, problem) as engine:
            for start, stop in segments:
                updates = range(start, stop)
                for k in checked(run, engine, run.state(start), updates, Randomness()):
                    _same_as_kept(run, engine.live(), k + 1)
                    progress.advance()
    finally:
        progress.finish()
    return count


def _segments(run: Run) -> Sequence[tuple[int, int]]:
    bounds = sorted({*run.kept_states, run.num_steps})
    return list(itertools.pairwise(bounds))


def _same_as_kept(run: Run, live: State, k: int) -> None:
    """Where s_k was kept, compare the optimizer's slots too; each update's record has none."""
    if k not in run.tables.states or run.held_before(live, k).digest() == run.tables.states[k][0]:
        return
    ends = {run.num_steps, *(job.stop for job in run.manifest.earlier)}
    if k in ends and not run.state(k).slots:
        return  # the loop cleared or replaced its optimizer after a job's last update
    raise IntegrityError(
        f"{run.source.where}: executed again, update {k - 1} leads to another optimizer state than"
        f" the kept s_{k}."
    )
