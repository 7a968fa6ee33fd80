"""``culpa.record``: open a record around a training loop, and close it whatever happens inside."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from culpa._version import __version__
from culpa.errors import OptionError, StoreError, UnsupportedError
from culpa.problem import Problem
from culpa.trajectory import environment
from culpa.trajectory import resume as resuming
from culpa.trajectory.checkpoints import CheckpointPolicy, Thinned
from culpa.trajectory.durability import Durability
from culpa.trajectory.observer import Observer
from culpa.trajectory.recorder import Recorder
from culpa.trajectory.resume import Resumption
from culpa.trajectory.run import describe_tensors
from culpa.trajectory.schema import LOG, MANIFEST, PACK, STATES, Manifest
from culpa.trajectory.settings import Settings
from culpa.trajectory.state import State
from culpa.trajectory.store import Store
from culpa.trajectory.writer import Writer
from culpa.tree import Tree


@contextmanager
def record(
    path: str | Path,
    problem: Problem,
    optimizer: torch.optim.Optimizer,
    *,
    scheduler: Any = None,
    scaler: Any = None,
    clip_grad_norm: float | None = None,
    checkpoints: CheckpointPolicy | None = None,
    durability: Durability | None = None,
    examples: str = "stored",
    strict: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> Generator[Recorder]:
    """Record the updates that ``optimizer`` makes inside this block into the folder ``path``.

    Args:
        path: a folder that does not exist yet.
        problem: the model and the loss the loop minimises.
        optimizer: of ``torch.optim``; several parameter groups are fine.
        scheduler: what sets the learning rates, if something does. Every update's are recorded in
            any case; resuming puts the scheduler itself back too, so it needs to know it.
        scaler: an enabled ``GradScaler`` is refused by this version.
        clip_grad_norm: the ``max_norm`` if the loop calls ``clip_grad_norm_`` on all parameters.
        checkpoints: which states to keep; default ``culpa.Thinned()``, O(sqrt(K)) of them.
        durability: how much a crash may cost; default ``culpa.Durability(2.0, 200)``: at most the
            last 200 updates.
        examples: ``"reference"`` keeps digests of the training examples instead of their bytes; a
            replay then needs the data, and the run cannot be resumed.
        strict: if the disk fails, raise. Otherwise warn (``culpa.RecordingStopped``), keep what
            was recorded so far as a truncated run, and let training go on.
        resume: go on with the record in ``path`` if there is one: run the same script again; what
            is recorded is passed over, and the final state is that of an undisturbed run
            (trajectory/resume.py says how, and what a loop must not do). A complete run is refused.
        overwrite: replace a run that ``path`` holds already.

    Yields:
        A ``Recorder``. The first update of each stage is executed a second time, from the same
        state, and compared bit for bit: a loop that does something unmodelled is told at once.

    Raises:
        StoreError: if ``path`` exists (or is no run, with ``overwrite``), or cannot be written
            (with ``strict``).
        RecordError: if the loop does what a replay could not repeat or, resuming, what is not in
            the record.
        ProblemError: if loss, model and optimizer do not fit together.
    """
    folder = Path(path)
    if scaler is not None and scaler.is_enabled():
        raise UnsupportedError(
            "an enabled GradScaler is not supported yet; record in float32 or bfloat16."
        )
    if clip_grad_norm is not None and not clip_grad_norm > 0:
        raise OptionError(
            f"clip_grad_norm is the positive max_norm of the loop's call, got {clip_grad_norm}."
        )
    if examples not in ("stored", "reference"):
        raise OptionError(f"examples must be 'stored' or 'reference', got {examples!r}.")
    if resume and overwrite:
        raise OptionError("resume=True goes on with a run, overwrite=True removes it: pass one.")
    policy, durability = checkpoints or Thinned(), durability or Durability()
    settings = Settings(policy, durability, clip_grad_norm, scheduler, strict)
    observer = Observer(problem, optimizer)
    ahead = _resumption(folder, problem, observer, scheduler) if resume else None
    if ahead is None:
        initial = observer.state(observer.held, slots=True)
        _make_room(folder, replace=overwrite or resume)
        open_store = partial(_create, folder, observer, initial, examples)
    else:
        observer.write(ahead.state, ahead.frozen)
        initial = State(ahead.state.params, ahead.state.buffers)
        open_store = partial(_reopen, folder, ahead)
    recorder = _recorder(folder, open_store, observer, settings, initial, ahead)
    del ahead
    try:
        yield recorder
    except BaseException as error:
        recorder.close("interrupted", f"{type(error).__name__}: {error}"[:500])
        raise
    recorder.close("complete", "")


def _recorder(
    folder: Path,
    open_store: Callable[[], Store],
    observer: Observer,
    settings: Settings,
    initial: State,
    ahead: Resumption | None,
) -> Recorder:
    size = sum(v.nbytes for v in initial.params.values())
    writer = Writer(
        folder,
        open_store,
        settings.policy,
        settings.durability,
        strict=settings.strict,
        size=size,
    )
    return Recorder(writer, observer, settings, initial, ahead)


def _create(folder: Path, observer: Observer, initial: State, examples: str) -> Store:
    params = observer.params
    frozen: Tree = {name: p for name, p in params.items() if name not in observer.held}
    manifest = Manifest(
        culpa_version=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        status="recording",
        environment=environment.capture(params.values()),
        parameters=describe_tensors(dict(params)),
        buffers=describe_tensors(dict(observer.buffers)),
        frozen=tuple(sorted(frozen)),
        examples="reference" if examples == "reference" else "stored",
    )
    return Store.create(folder, manifest, initial, State(frozen).clone())


def _resumption(
    folder: Path, problem: Problem, observer: Observer, scheduler: Any
) -> Resumption | None:
    if not (folder / MANIFEST).is_file():
        return None
    ahead = resuming.load(folder, scheduler, observer.optimizer)
    if ahead is not None:
        here = environment.capture(observer.params.values())
        environment.require_same(ahead.run.manifest.environment, here, str(folder))
        ahead.recompute(problem)
    return ahead


def _reopen(folder: Path, ahead: Resumption) -> Store:
    return Store.reopen(folder, resuming.as_recording(ahead.run.manifest))


def _make_room(folder: Path, *, replace: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise StoreError(f"{folder} exists and is no culpa run; choose a path that does not exist.")
    found = {file.name for file in folder.iterdir()}
    if found and not (MANIFEST in found or all(map(_is_ours, found))):
        raise StoreError(f"{folder} exists and is no culpa run; choose a path that does not exist.")
    if found and not replace:
        what = "a run already" if MANIFEST in found else "what is left of a run that never began"
        raise StoreError(
            f"{folder} holds {what}. Choose another path, or pass overwrite=True (to go on with an"
            " unfinished run: resume=True)."
        )
    shutil.rmtree(folder)


def _is_ours(name: str) -> bool:
    """Whether a recording that is killed before its manifest is written may leave this."""
    return name in (STATES, PACK) or name.startswith((LOG, f"{MANIFEST}.tmp"))
