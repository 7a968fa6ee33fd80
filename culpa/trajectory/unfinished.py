"""An unfinished run on the disk: made ready to be gone on with, and read as far as that needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from culpa.errors import IntegrityError, OptionError, StoreError, UnsupportedError
from culpa.trajectory import log
from culpa.trajectory.point import EndedLoop, Point
from culpa.trajectory.resume import Loop, Resumption
from culpa.trajectory.run import Run, open_run
from culpa.trajectory.schema import LOG
from culpa.trajectory.seal import as_recording
from culpa.trajectory.store import Store
from culpa.trajectory.together import members_of


def prepare(folder: Path) -> bool:
    """Recover and verify what is there; whether there are updates to go on from.

    Cost: reads the whole folder once.

    Raises:
        StoreError: if the run is complete.
        UnsupportedError: if its batches are elsewhere.
        IntegrityError: if what is there was damaged.
    """
    run = open_run(folder)
    if not run.manifest.finished:
        del run
        log.recover(folder / LOG)
        run = open_run(folder)
    unclosed = run.num_steps > 0 and run.num_steps in run.kept_states
    if unclosed and not run.manifest.finished and _read(run, 0)[2] is None:
        # Killed between closing the log and writing the manifest: that is all there is to do.
        manifest = as_recording(run.manifest)
        del run  # a log that is being read cannot be folded into one file
        Store.reopen(folder, manifest).finish(None, "complete", "", 0.0)
        run = open_run(folder)
    if run.manifest.status == "complete":
        raise StoreError(
            f"{folder} holds a complete run; there is nothing to resume. Open it with"
            " culpa.open_run, or pass overwrite=True to record anew."
        )
    if run.num_steps == 0:
        return False
    if run.manifest.examples != "stored":
        raise UnsupportedError(
            f"{folder} was recorded with examples='reference': its batches are elsewhere, so the"
            " state at the last commit cannot be recomputed here. Record anew."
        )
    run.verify(level="digest")
    return True


def load(
    folder: Path, scheduler: Any, optimizer: Any, *, append: bool, rank: int = 0, ranks: int = 1
) -> tuple[Resumption, Run]:
    """What there is to go on from, of one rank; and the run, whose state is to be recomputed.

    Raises:
        StoreError: if there is no point.
        OptionError: if a scheduler drives the optimizer but was not passed.
        UnsupportedError: if another number of ranks recorded it.
    """
    run = open_run(folder)
    if run.manifest.earlier and not append:
        raise OptionError(
            f"the unfinished job in {folder} was appended to a run: pass append=True,"
            " resume=True in its script."
        )
    driven = [m for m in members_of(optimizer) if hasattr(m.step, "_wrapped_by_lr_sched")]
    if scheduler is None and driven:
        raise OptionError(
            "a learning-rate scheduler drives this optimizer: pass it, culpa.record(...,"
            " scheduler=scheduler), so that its state is recorded and put back on resume."
        )
    reduction = run.step(run.num_steps - 1).optimizer.reduction
    made_on = 1 if reduction is None else reduction.ranks
    if made_on != ranks:
        raise UnsupportedError(
            f"the job in {folder} began on {_processes(made_on)} and is resumed on"
            f" {_processes(ranks)}; it goes on with as many as it began with, each with generators"
            f" and a loader of its own. Start as many (torchrun --nproc-per-node {made_on}), or"
            " record anew with overwrite=True."
        )
    loops, draws, content = _read(run, rank)
    if content is None:
        raise StoreError(f"{folder} has updates but no point to go on from; record anew.")
    point = Point.decode(content)
    if len(point.loops) > 1:
        raise UnsupportedError(
            f"{folder} cannot be resumed: {len(point.loops)} loops over recorder.batches were"
            " going on at once. Use recorder.step for such loops."
        )
    return Resumption(run, rank, ranks, point, loops, draws), run


def _processes(count: int) -> str:
    return "one process" if count == 1 else f"{count} processes"


def _read(run: Run, rank: int) -> tuple[list[Loop], dict[int, bytes], bytes | None]:
    """Of a rank, the loops that ended, the generators before draws, and the point."""
    first = log.of_rank(rank, log.POINT)
    rows = ((key - first, content) for key, content in run.tables.log.rows("resume"))
    content = {key: data for key, data in rows if 0 <= key < 1 << log.OF_RANK}
    point, loops = content.pop(log.POINT, None), list[Loop]()
    for key in [k for k in content if log.loop_id((k >> 32) - 1) == k]:
        try:
            ended = msgspec.msgpack.decode(content.pop(key), type=EndedLoop)
        except msgspec.MsgspecError as error:
            raise IntegrityError(f"{run.tables.where}: table resume, row {key}: {error}") from error
        loops.append(Loop((key >> 32) - 1, *ended))
    return loops, content, point
