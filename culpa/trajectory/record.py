"""``culpa.record``: open a record around a training loop, and close it whatever happens inside."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from torch.optim import Optimizer

from culpa._version import __version__
from culpa.errors import OptionError, StoreError, UnsupportedError
from culpa.problem import Problem
from culpa.trajectory import environment, files, jobs
from culpa.trajectory.checkpoints import CheckpointPolicy, Thinned
from culpa.trajectory.durability import Durability
from culpa.trajectory.fits import describe_tensors
from culpa.trajectory.frozen import encode as encode_frozen
from culpa.trajectory.observer import Observer
from culpa.trajectory.ranks import goingon
from culpa.trajectory.ranks.exchange import Exchange
from culpa.trajectory.ranks.recording import Partners, partners
from culpa.trajectory.recorder import Recorder
from culpa.trajectory.resume import Resumption
from culpa.trajectory.schema import LOG, MANIFEST, PACK, STATES, Manifest
from culpa.trajectory.settings import Settings
from culpa.trajectory.state import State, raws
from culpa.trajectory.store import Store
from culpa.trajectory.together import all_of, as_one
from culpa.trajectory.writer import Writer
from culpa.tree import Tree


@contextmanager
def record(
    path: str | Path,
    problem: Problem,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    scheduler: Any = None,
    scaler: Any = None,
    clip_grad_norm: float | None = None,
    clip_grad_value: float | None = None,
    checkpoints: CheckpointPolicy | None = None,
    durability: Durability | None = None,
    examples: str = "stored",
    frozen: str = "stored",
    strict: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    append: bool = False,
) -> Generator[Recorder]:
    """Record the updates that ``optimizer`` makes inside this block into the folder ``path``.

    Args:
        path: a folder that does not exist yet.
        problem: the model and the loss the loop minimises.
        optimizer: of ``torch.optim``; several parameter groups are fine. A list of optimizers of
            disjoint parameters, if each of them steps once in every update.
        scheduler: what sets the learning rates, if something does, or a list of such. Every
            update's are recorded in any case; resuming puts the schedulers themselves back too, so
            it needs to know them.
        scaler: the ``GradScaler`` of a loop that scales its loss. Updates that it skips because a
            gradient overflowed are no updates.
        clip_grad_norm: the ``max_norm`` if the loop calls ``clip_grad_norm_`` on all parameters.
        clip_grad_value: the ``clip_value`` if it calls ``clip_grad_value_`` on all of them.
        checkpoints: which states to keep; default ``culpa.Thinned()``, O(sqrt(K)) of them.
        durability: how much a crash may cost; default ``culpa.Durability(2.0, 200)``: at most the
            last 200 updates.
        examples: ``"reference"`` keeps digests of the training examples instead of their bytes; a
            replay then needs the data, and the run cannot be resumed.
        frozen: what is kept of parameters that no optimizer holds: their values, ``"stored"`` once;
            or ``"reference"``, digests only, as for a large base model under adapters. Whoever
            walks the run then needs a model with the same, and none of them may train later. A
            run that is gone on with stays as it was begun.
        strict: if the disk fails, raise. Otherwise warn (``culpa.RecordingStopped``), keep what
            was recorded so far as a truncated run, and let training go on.
        resume: go on with the record in ``path`` if there is one: run the same script again; what
            is recorded is passed over, and the final state is that of an undisturbed run
            (trajectory/resume.py says how, and what a loop must not do). A complete run is refused.
            Several ranks go on as many as they were, each of which reads ``path``.
        overwrite: replace a run that ``path`` holds already.
        append: go on with the complete run in ``path``, if there is one, by further stages: a job
            after another, in this process or the next. Parameters and buffers must be as the run
            left them; the optimizer is a new one, or goes on with the state it had. The loss may
            be another: whoever walks the run again needs ``culpa.Problem.by_stage``, since
            nothing tells whether two jobs had the same. The longer run has another root digest;
            it lists those of its jobs, which every verification recomputes; a ``Run`` opened
            before must be opened again. If an appended job crashes: run its script, not those of
            the jobs before, with ``append=True, resume=True``; or ``append=True, overwrite=True``
            takes back what it recorded, nothing of the complete jobs before, and begins it anew.

    Yields:
        A ``Recorder``. The first update of each stage is executed a second time, from the same
        state, and compared bit for bit: a loop that does something unmodelled is told at once.
        Later ones are now and then, within 1 % of the training time (trajectory/guard.py).

    Raises:
        StoreError: if ``path`` exists (or is no run, with ``overwrite``; or its last job is
            unfinished, with ``append``), or cannot be written (with ``strict``).
        RecordError: if the loop does what a replay could not repeat or, resuming, what is not in
            the record.
        ProblemError: if loss, model and optimizer do not fit together.
    """
    folder = Path(path)
    for name, bound in (("clip_grad_norm", clip_grad_norm), ("clip_grad_value", clip_grad_value)):
        if bound is not None and not bound > 0:
            raise OptionError(f"{name} is the positive bound of the loop's call, got {bound}.")
    if clip_grad_norm is not None and clip_grad_value is not None:
        raise UnsupportedError(
            "clipping by norm and by value in the same update is not supported; their order would"
            " matter. Declare one of them and leave the other out of the loop."
        )
    if examples not in ("stored", "reference"):
        raise OptionError(f"examples must be 'stored' or 'reference', got {examples!r}.")
    if frozen not in ("stored", "reference"):
        raise OptionError(f"frozen must be 'stored' or 'reference', got {frozen!r}.")
    if resume and overwrite:
        raise OptionError("resume=True goes on with a run, overwrite=True removes it: pass one.")
    policy, durability = checkpoints or Thinned(), durability or Durability()
    scaler = scaler if scaler is not None and scaler.is_enabled() else None
    beside = all_of([*(scheduler if isinstance(scheduler, (list, tuple)) else [scheduler]), scaler])
    stepper = as_one(optimizer)
    others = partners(problem, stepper, scaler)
    settings = Settings(
        policy, durability, clip_grad_norm, clip_grad_value, beside, scaler, strict, others
    )
    observer = (Observer if others is None else others.observer)(problem, stepper)
    begun = ahead = None
    if append:
        seen = observer.gathered()
        begin = partial(jobs.begin, folder, seen, examples, resume=resume, overwrite=overwrite)
        begun = begin() if others is None else goingon.begun(others, seen, begin)
        del seen, begin
    if resume and begun is None:
        ahead = goingon.ahead(others, folder, problem, observer, scheduler, append=append)
    base = jobs.Base()
    if begun is not None:
        base, initial, open_store = begun.base, begun.initial, partial(begun.open_store, folder)
    elif ahead is None:
        initial = observer.state(observer.held, slots=True)
        _require_room(folder, overwrite or resume, others)
        begins = observer.frozen(), initial
        open_store = partial(_create, folder, observer, begins, examples, frozen)
        del begins
    else:
        base = ahead.base
        observer.write(ahead.state, ahead.frozen)
        # What takes the others over comes in its stage.
        held = {name: v for name, v in ahead.state.params.items() if name in ahead.begins_with}
        initial = State(held, ahead.state.buffers)
        open_store = partial(ahead.open_store, folder)
    recorder = _recorder(folder, open_store, observer, settings, initial, ahead, base)
    if others is not None:
        others.start()
    del ahead, initial, open_store  # of a model that is sharded only the first rank keeps a copy
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
    base: jobs.Base,
) -> Recorder:
    size = sum(v.nbytes for v in initial.params.values())
    made = partial(
        Writer,
        folder,
        open_store,
        settings.policy,
        settings.durability,
        strict=settings.strict,
        size=size,
    )
    others = settings.partners
    if others is None:
        writer = made()
    else:
        own = made() if others.group.first else None
        writer = Exchange(others.group, folder, settings.policy, own, replicated=others.replicated)
    return Recorder(writer, observer, settings, initial, ahead, base)


def _create(
    folder: Path, observer: Observer, begins: tuple[Tree, State], examples: str, kept: str
) -> Store:
    params, (frozen, initial) = observer.params, begins
    manifest = Manifest(
        culpa_version=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        status="recording",
        environment=environment.capture(params.values()),
        parameters=describe_tensors(dict(params)),
        buffers=describe_tensors(dict(observer.buffers)),
        frozen=tuple(sorted(frozen)),
        examples="reference" if examples == "reference" else "stored",
        frozen_values="reference" if kept == "reference" else msgspec.UNSET,
    )
    _clear(folder)
    content = encode_frozen(frozen, by_reference=manifest.frozen_by_reference)
    return Store.create(folder, manifest, raws(initial.flat()), content)


def _require_room(folder: Path, replace: bool, others: Partners | None) -> None:
    if others is not None:
        others.group.on_first(lambda: _require_room(folder, replace, None))
        return
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


def _clear(folder: Path) -> None:
    """Remove the run that is there. First of all its manifest: what is left is then no run."""
    if folder.exists():
        files.remove(folder / MANIFEST)
        files.flush_folder(folder)
        shutil.rmtree(folder)


def _is_ours(name: str) -> bool:
    """Whether a recording that is killed before its manifest is written may leave this."""
    return name in (STATES, PACK) or name.startswith((LOG, f"{MANIFEST}.tmp"))
