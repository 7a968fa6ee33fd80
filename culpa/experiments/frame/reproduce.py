"""Running an experiment from its options to its page."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec

from culpa.errors import OptionError
from culpa.experiments.data.folder import DataFolder
from culpa.experiments.frame.experiment import Experiment, Setup
from culpa.experiments.frame.findings import Result
from culpa.experiments.frame.work import Work
from culpa.progress import Progress, Silent
from culpa.trajectory.files import write_durably


def reproduce(
    experiment: Experiment,
    *,
    scale: str = "small",
    seeds: int | None = None,
    work: Path,
    data: DataFolder | None = None,
    fresh: bool = False,
    keep_runs: bool = True,
    progress: Progress | None = None,
) -> Result:
    """Run an experiment, going on from the parts that are finished, and write ``result.json``.

    Args:
        experiment: see ``culpa.experiments.registry``.
        scale: ``"paper"``, ``"small"`` or ``"smoke"``.
        seeds: how many; default as many as the scale has.
        work: a folder; parts, runs and the result are kept in ``<work>/<scale>/<name>``.
        data: where data sets are looked for; default ``DataFolder.find()``.
        fresh: forget the parts that are finished.
        keep_runs: whether recorded runs stay on disk.
        progress: see ``culpa.progress``.

    Raises:
        OptionError: an unknown scale, or data that is asked for and not there.
    """
    options: Any = experiment.options(scale)
    if seeds is not None:
        if seeds < 1:
            raise OptionError(f"--seeds takes at least 1, got {seeds}.")
        options = msgspec.structs.replace(options, seeds=seeds)
    folder, watch = work / scale / experiment.name, progress or Silent()
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    # How many seeds there are does not change what one of them gives.
    shared = {n: v for n, v in msgspec.to_builtins(options).items() if n != "seeds"}
    kept = Work(folder, shared, watch, keep_runs=keep_runs)
    numbers = tuple(range(options.seeds))
    try:
        findings = experiment.run(Setup(scale, options, numbers, data or DataFolder.find(), kept))
    finally:
        watch.finish()
    result = Result(
        experiment=experiment.name,
        title=experiment.title,
        paper=experiment.paper,
        must_show=experiment.must_show,
        scale=scale,
        seeds=numbers,
        machine="; ".join(dict.fromkeys(part.machine for part in kept.finished)),
        minutes=sum(part.seconds for part in kept.finished) / 60,
        findings=findings,
        runs=tuple(run for part in kept.finished for run in part.runs),
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(
        folder / "result.json", msgspec.json.format(msgspec.json.encode(result), indent=1)
    )
    return result
