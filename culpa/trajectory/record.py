"""``culpa.record``: open a record around a training loop, and close it whatever happens inside."""

from __future__ import annotations

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from culpa._version import __version__
from culpa.errors import OptionError, StoreError, UnsupportedError
from culpa.problem import Problem
from culpa.trajectory import environment
from culpa.trajectory.checkpoints import CheckpointPolicy, Thinned
from culpa.trajectory.observer import Observer
from culpa.trajectory.recorder import Recorder
from culpa.trajectory.run import describe_tensors
from culpa.trajectory.schema import Manifest
from culpa.trajectory.state import State
from culpa.trajectory.writer import MANIFEST, Writer
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
    resume: bool = False,
    overwrite: bool = False,
) -> Generator[Recorder]:
    """Record the updates that ``optimizer`` makes inside this block into the folder ``path``.

    Args:
        path: a folder that does not exist yet.
        problem: the model and the loss the loop minimises.
        optimizer: of ``torch.optim``; several parameter groups are fine.
        scheduler: accepted for loops that pass it on; every update's learning rates are recorded.
        scaler: an enabled ``GradScaler`` is refused by this version.
        clip_grad_norm: the ``max_norm`` if the loop calls ``clip_grad_norm_`` on all parameters.
        checkpoints: which states to keep; default ``culpa.Thinned()``, O(sqrt(K)) of them.
        resume: going on with an interrupted record is refused by this version.
        overwrite: replace a run that ``path`` holds already.

    Yields:
        A ``Recorder``. The first update of each stage is executed a second time, from the same
        state, and compared bit for bit: a loop that does something unmodelled is told at once.

    Raises:
        StoreError: if ``path`` exists (or is no run, with ``overwrite``), or cannot be written.
        RecordError: if the loop does what a replay could not repeat.
        ProblemError: if loss, model and optimizer do not fit together.
    """
    folder = Path(path)
    if scaler is not None and scaler.is_enabled():
        raise UnsupportedError(
            "an enabled GradScaler is not supported yet; record in float32 or bfloat16."
        )
    if resume:
        raise UnsupportedError("resume=True is not supported yet; record into a new folder.")
    if clip_grad_norm is not None and not clip_grad_norm > 0:
        raise OptionError(
            f"clip_grad_norm is the positive max_norm of the loop's call, got {clip_grad_norm}."
        )
    observer, policy = Observer(problem, optimizer), checkpoints or Thinned()
    params = observer.params
    frozen: Tree = {name: p for name, p in params.items() if name not in observer.held}
    manifest = Manifest(
        culpa_version=__version__,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        status="recording",
        environment=environment.capture(),
        parameters=describe_tensors(dict(params)),
        buffers=describe_tensors(dict(observer.buffers)),
        frozen=tuple(sorted(frozen)),
    )
    initial = observer.state(observer.held, slots=True)
    _make_room(folder, overwrite)
    writer = Writer(folder, manifest, initial, State(frozen).clone(), policy)
    recorder = Recorder(writer, observer, clip_grad_norm, policy, initial)
    try:
        yield recorder
    except BaseException as error:
        recorder.close("interrupted", f"{type(error).__name__}: {error}"[:500])
        raise
    recorder.close("complete", "")


def _make_room(folder: Path, overwrite: bool) -> None:
    if not folder.exists():
        return
    if (folder / MANIFEST).is_file():
        if not overwrite:
            raise StoreError(
                f"{folder} holds a run already. Choose another path, or pass overwrite=True."
            )
        shutil.rmtree(folder)
    elif not folder.is_dir() or any(folder.iterdir()):
        raise StoreError(f"{folder} exists and is no culpa run; choose a path that does not exist.")
    else:
        folder.rmdir()
