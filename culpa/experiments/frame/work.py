"""Work that survives interruption: every finished part is kept, with what it was made of."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch

from culpa._version import __version__
from culpa.errors import OptionError
from culpa.experiments.frame.findings import RunFacts
from culpa.experiments.frame.machine import machine
from culpa.progress import Progress, Silent
from culpa.trajectory.files import write_durably
from culpa.trajectory.run import Run, open_run


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """A finished part as it is on disk.

    ``versions`` are culpa's and torch's, ``machine`` is the one it was made on; ``seconds`` of
    processor time.
    """

    key: str
    options: dict[str, Any]
    versions: dict[str, str]
    machine: str
    runs: tuple[RunFacts, ...]
    seconds: float
    value: Any


class Part:
    """One part at work: gives out folders for its runs and notes what was recorded there."""

    def __init__(self, key: str, folder: Path) -> None:
        self.key = key
        self.runs: list[RunFacts] = []
        self._folder = folder

    def folder(self, name: str) -> Path:
        """Where to record a run; pass ``overwrite=True``, as an interrupted part may have left one.

        The folder of the part is made.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder / name

    def opened(self, name: str) -> Run:
        """The run recorded there, verified (every digest); its root digest is kept."""
        run = open_run(self._folder / name)
        run.verify()
        self.runs.append(RunFacts(f"{self.key}/{name}", run.root_digest, run.num_steps))
        return run


class Work:
    """The parts of one experiment at one scale.

    Args:
        folder: holds ``parts/<key>.json`` and ``runs/<key>/<name>``.
        options: of the experiment's scale; a part made with others is made again.
        progress: one unit a part.
        keep_runs: whether recorded runs stay when their part is finished.
    """

    def __init__(
        self,
        folder: Path,
        options: Mapping[str, Any],
        progress: Progress | None = None,
        *,
        keep_runs: bool = True,
    ) -> None:
        self.folder = folder
        self.options = dict(options)
        self.progress = progress or Silent()
        self.keep_runs = keep_runs
        self.finished: list[Kept] = []
        self.computed: list[str] = []
        """Keys of the parts that were not at hand."""

    def plan(self, parts: int) -> None:
        """Say how many parts there will be."""
        self.progress.start(self.folder.name, parts)

    def part(self, key: str, options: Mapping[str, Any], make: Callable[[Part], Any]) -> Any:
        """The value of a part: the kept one, if it was made with these options, else made now.

        Args:
            key: lower case, a file's name.
            options: what distinguishes this part beyond the experiment's options: the seed, say,
                and which data was there.
            make: makes the value, which JSON must be able to hold.

        Returns:
            The value as JSON gives it back, whether it was made now or before.
        """
        wanted = _plain({**self.options, **options})
        file = self.folder / "parts" / f"{key}.json"
        kept = _read(file)
        if kept is None or (kept.options, kept.versions) != (wanted, _versions()):
            kept = self._made(key, wanted, make, file)
        self.finished.append(kept)
        self.progress.advance()
        return kept.value

    def _made(
        self, key: str, options: dict[str, Any], make: Callable[[Part], Any], file: Path
    ) -> Kept:
        part = Part(key, self.folder / "runs" / key)
        began = time.process_time()
        value = make(part)
        kept = Kept(
            key=key,
            options=options,
            versions=_versions(),
            machine=machine(),
            runs=tuple(part.runs),
            seconds=time.process_time() - began,
            value=_plain(value),
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        write_durably(file, msgspec.json.format(msgspec.json.encode(kept), indent=1))
        self.computed.append(key)
        if not self.keep_runs:
            shutil.rmtree(self.folder / "runs" / key, ignore_errors=True)
        return kept


def _versions() -> dict[str, str]:
    return {"culpa": __version__, "torch": str(torch.__version__)}


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return msgspec.json.decode(msgspec.json.encode(value))


def _read(file: Path) -> Kept | None:
    """A kept part; ``None`` where there is none."""
    if not file.exists():
        return None
    try:
        return msgspec.json.decode(file.read_bytes(), type=Kept)
    except msgspec.DecodeError as error:
        raise OptionError(
            f"{file} is no part that culpa reproduce kept ({error}). Remove it, or begin anew with"
            " --fresh."
        ) from error
