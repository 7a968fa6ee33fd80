"""Jobs in sequence: a further job goes on with a complete run, in the same process or another.

The chain goes on where it ended, so the longer run has a root digest of its own. That of each
earlier job stays: the manifest lists them, and every verification recomputes each from the longer
run's rows (lineage.py), so a signed first job is proved to be the beginning of what came of it. For
that, all states of a complete job stay: none of them is thinned out by a later one.

The manifest is replaced before the log is touched. So a crash leaves one of three things: the
complete run; the same, with a manifest that says that a job has begun, and still the seal of
before (lineage.py); or a run with updates of the unfinished job, as after any crash. The last is
resumed by the script of that job alone, whose loops and draws are numbered by its own process, or
taken back.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
from torch import Tensor

from culpa.errors import OptionError, ProblemError, RecordError, StoreError
from culpa.problem import Problem
from culpa.trajectory import digest, environment, files, log
from culpa.trajectory.fits import different_model
from culpa.trajectory.frozen import digest_of_all
from culpa.trajectory.lineage import link_at
from culpa.trajectory.observer import Observer
from culpa.trajectory.run import Run, open_run
from culpa.trajectory.schema import FROZEN_NAME, LOG, MANIFEST, Job, Manifest
from culpa.trajectory.seal import Resuming, as_recording
from culpa.trajectory.state import State, largest_difference
from culpa.trajectory.store import Store


@dataclass(frozen=True)
class Base:
    """What earlier jobs recorded, as far as the next one needs it; by default nothing."""

    index: int = 0
    """The number of their updates."""
    names: frozenset[str] = frozenset()
    """Of their stages."""
    losses: int = 0
    """How many problems they had."""
    fresh: bool = False
    """Whether the optimizer that takes over starts anew."""


@dataclass(frozen=True)
class Begun:
    """A further job: what it stands on, s_k without slots, and the manifest while it goes on."""

    base: Base
    initial: State
    manifest: Manifest

    def open_store(self, folder: Path) -> Store:
        """The folder to write on."""
        files.write_durably(folder / MANIFEST, self.manifest.encode())
        return Store.reopen(folder, self.manifest)


def begin(
    folder: Path, observer: Observer, examples: str, *, resume: bool, overwrite: bool
) -> Begun | None:
    """Make ready to go on with the run in ``folder``.

    ``None``: there is none, or its last job is to be resumed.

    Cost: reads the whole folder once.

    Raises:
        StoreError: if its last job is unfinished and is neither resumed nor overwritten.
        RecordError: if module or optimizer are not as the run left them.
    """
    if not (folder / MANIFEST).is_file():
        return None
    run = _recovered(folder)
    earlier, done = run.manifest.earlier, run.manifest.status == "complete"
    stop = run.num_steps if done else earlier[-1].stop if earlier else 0
    made = run.num_steps - stop
    if not done:
        if resume and (made or not earlier):
            return None
        if not earlier:
            raise StoreError(
                f"{folder} holds an unfinished run of one job, which nothing can be appended to."
                " Run that job's script again with resume=True, or record it anew with"
                " overwrite=True and without append=True."
            )
        if made and not overwrite:
            raise StoreError(
                f"{folder} holds {made} updates of an appended job that did not finish. Run its"
                " script again with append=True, resume=True to go on with it, or with"
                f" append=True, overwrite=True to begin it anew after update {stop - 1} (earlier"
                " jobs stay)."
            )
    else:
        run.verify(level="digest")
    if run.manifest.examples != examples:
        raise OptionError(
            f"{folder} was recorded with examples={run.manifest.examples!r}: pass that too."
        )
    here = environment.capture(observer.params.values())
    environment.require_same(run.manifest.environment, here, str(folder))
    before = run.state(stop)
    _require_same(run, before, observer)
    final = run.held_before(before, stop)
    base = _base(run, stop, fresh=_starts_fresh(final, observer, folder))
    if not done:  # only now that nothing speaks against beginning anew
        used, link = _last_used(run, stop), link_at(run, stop)
        manifest = as_recording(run.manifest)
        del run
        _take_back(folder, manifest, stop, used, link)
        run = open_run(folder)
        run.verify(level="digest")
    manifest = run.manifest
    job = Job(stop, manifest.plain_seconds, run.root_digest)
    growing = msgspec.structs.replace(as_recording(manifest), jobs=(*manifest.earlier, job))
    return Begun(base, State(final.params, final.buffers), growing)


def base_of(run: Run) -> Base:
    """What an unfinished job stands on; nothing, in the first."""
    earlier = run.manifest.earlier
    return _base(run, earlier[-1].stop) if earlier else Base()


def of_this_job(run: Run, problem: Problem) -> Problem:
    """The problem to walk the updates of an unfinished job with, given that of its own script."""
    base = base_of(run)
    if base.index == 0:
        return problem
    mine = [stage for stage in run.stages if stage.start >= base.index]
    losses = 1 + max(run.step(stage.start).loss for stage in mine) - base.losses
    problem.require_stages([stage.name for stage in mine], losses, complete=False)
    own = {stage.name: problem.of(stage.name) for stage in mine}
    unused = own[mine[0].name]  # no update of an earlier job is walked
    return Problem.by_stage({stage.name: own.get(stage.name, unused) for stage in run.stages})


def _recovered(folder: Path) -> Run:
    run = open_run(folder)
    if not run.manifest.finished:
        del run
        log.recover(folder / LOG)
        run = open_run(folder)
    return run


def _base(run: Run, stop: int, *, fresh: bool = False) -> Base:
    stages = [stage for stage in run.stages if stage.stop <= stop]
    losses = 1 + max((run.step(stage.start).loss for stage in stages), default=0)
    return Base(stop, frozenset(stage.name for stage in stages), losses, fresh)


def _require_same(run: Run, state: State, observer: Observer) -> None:
    """Raise unless the module is in a state that a job ended with, bit for bit."""
    wrong = different_model(run.manifest, dict(observer.params), dict(observer.buffers))
    if wrong:
        raise ProblemError(
            f"the model is not the one recorded in {run.path}: {'; '.join(wrong[:5])}. One run is"
            " of one module: let it have from the beginning what trains later. If it has new"
            " parameters (a new head, adapters), go on with culpa.grow(run, path, model); if names"
            " changed, culpa.Grown keeps them."
        )
    run.frozen.give(observer.params)  # by reference: they are compared, or taken, here
    known = {} if run.frozen.by_reference else run.frozen_parameters()
    recorded = State(known | state.params, state.buffers).flat()
    live = State(
        {
            name: value.detach().cpu()
            for name, value in observer.params.items()
            if name not in run.frozen.by_reference
        },
        {name: value.detach().cpu() for name, value in observer.buffers.items()},
    ).flat()
    if name := _worst(live, recorded):
        raise RecordError(
            f"append=True goes on from the final state of {run.path}, and {name} of the live model"
            " is not as it was there. Put the model into that state first, parameters and buffers"
            " (culpa.open_run(path).final_state() and .final_buffers(), or the file that"
            " culpa.replay(run, problem).save wrote); or record the job as a run of its own."
        )


def _starts_fresh(final: State, observer: Observer, folder: Path) -> bool:
    live = State({}, {}, observer.state({}, slots=True).slots).flat()
    if not live:
        return True
    if name := _worst(live, State({}, {}, final.slots).flat()):
        raise RecordError(
            f"the optimizer given to culpa.record(append=True) has a state, and {name} of it is"
            f" not as the run in {folder} left it. Pass a new optimizer, or the very one that made"
            " the last update (its state_dict loaded, in another process)."
        )
    return False


def _worst(live: dict[str, Tensor], recorded: dict[str, Tensor]) -> str:
    """The tensor that differs most, and by how much; empty if all have the same bytes."""
    here, there = (
        dict(zip(sorted(tree), digest.tensor_digests(tree), strict=True))
        for tree in (live, recorded)
    )
    if here == there:
        return ""
    name, size = largest_difference(live, recorded)
    odd = sorted(n for n in {**here, **there} if here.get(n) != there.get(n))
    return f"the tensor {name or odd[0]} (by up to {size:.3g})"


def _last_used(run: Run, stop: int) -> dict[str, int]:
    """By table the last row that the updates before ``stop`` name; rows are in order of use."""
    numbered = ("layout", "optimizer", "hypers", "random", "example")
    last: dict[str, int] = dict.fromkeys(numbered, -1)
    for row in run.tables.log.rows("step"):
        if row[0] >= stop:
            break
        named = {"optimizer": [row[1]], "hypers": [row[2]]}
        for micro in run.tables.decode_step(row).micro_batches:
            named.setdefault("layout", []).append(micro.layout)
            named.setdefault("example", []).extend(micro.rows)
            if micro.random is not None:
                named.setdefault("random", []).append(micro.random)
        for table, numbers in named.items():
            last[table] = max([last[table], *numbers])
    return last


def _take_back(
    folder: Path, manifest: Manifest, stop: int, used: dict[str, int], link: bytes
) -> None:
    """Remove what an unfinished job recorded; the folder is the complete run of before again."""
    files.write_durably(folder / MANIFEST, manifest.encode())
    connection = log.reopen(folder / LOG)
    try:
        for table, last in used.items():
            log.execute(connection, f"DELETE FROM {table} WHERE id > ?", (last,))
        log.execute(connection, "DELETE FROM step WHERE k >= ?", (stop,))
        log.execute(connection, "DELETE FROM stage WHERE start >= ?", (stop,))
        log.execute(connection, "DELETE FROM state WHERE k > ?", (stop,))
        frozen = digest_of_all((folder / FROZEN_NAME).read_bytes(), manifest)
        resuming = Resuming(connection, frozen)
        resuming.clear()
        resuming.seal(manifest, link)
        log.commit(connection)
    finally:
        log.abandon(connection)
    Store.reopen(folder, manifest).finish(None, "complete", "", 0.0)
