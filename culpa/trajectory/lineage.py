"""The jobs that a run is made of, one after another: that each was what the manifest says of it."""

from __future__ import annotations

from collections.abc import Sequence

from culpa.errors import IntegrityError
from culpa.trajectory.chain import root_digest
from culpa.trajectory.run import Run
from culpa.trajectory.schema import MANIFEST, Manifest, Stage
from culpa.trajectory.seal import after_job, as_recording, in_order


def check(run: Run, states: Sequence[tuple[int, bytes]], frozen: bytes) -> None:
    """Recompute the root digest of every earlier job, from rows and states that were checked.

    Args:
        run: a run whose chain was checked.
        states: index and digest of every kept state.
        frozen: digest of the parameters that were frozen at first.

    Raises:
        IntegrityError: naming the job.
    """
    at = 0
    for number, job in enumerate(run.manifest.earlier):
        if not at < job.stop <= run.num_steps or (
            job.stop == run.num_steps and run.manifest.finished
        ):
            raise IntegrityError(
                f"{run.source.where}/{MANIFEST}: jobs: job {number} ends at update {job.stop}, of"
                f" {run.num_steps}, after one that ends at {at}."
            )
        at = job.stop
        found = root_digest(
            after_job(run.manifest, number),
            link_at(run, at),
            [stage for stage in run.stages if stage.stop <= at],
            [state for state in states if state[0] <= at],
            frozen,
            in_order({}),
        )
        if found != job.root_digest:
            raise IntegrityError(
                f"{run.source.where}/{MANIFEST}: jobs: job {number} has the root digest"
                f" {job.root_digest}; that of the first {at} updates is {found}."
            )


def seals(
    manifest: Manifest,
    link: bytes,
    stages: Sequence[Stage],
    states: Sequence[tuple[int, bytes]],
    frozen: bytes,
    resuming: bytes,
) -> set[bytes]:
    """The seals that a log may have: its own and, while a job has only begun, that of before."""
    said = [manifest]
    jobs = manifest.earlier
    if jobs and not manifest.finished and stages and stages[-1].stop == jobs[-1].stop:
        said.append(after_job(manifest, len(jobs) - 1))
    rest = (link, stages, states, frozen, resuming)
    return {bytes.fromhex(root_digest(as_recording(one), *rest)) for one in said}


def link_at(run: Run, stop: int) -> bytes:
    """The link of the last update before ``stop``, as the log has it."""
    found = run.tables.log.row("step", stop - 1)
    if found is None:
        raise IntegrityError(f"{run.tables.where}: update {stop - 1} is missing.")
    return found[7]
