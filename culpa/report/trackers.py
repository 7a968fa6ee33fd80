"""An audit in an experiment tracker: MLflow, Weights & Biases or TensorBoard, by their public APIs.

Whoever passes a tracker has imported its package, so nothing here imports one. Under ``culpa/``:
the value of every behaviour and the effect of every stage as numbers, the table, the charts, the
report and the audit's JSON as files, and the run's root digest.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np

from culpa.auditing.record import AuditRecord, encode
from culpa.errors import OptionError, UnsupportedError
from culpa.report import html
from culpa.report.figures import figures
from culpa.report.matrix import best_of
from culpa.report.numbers import signed
from culpa.report.panels import grade_of

PREFIX: Final = "culpa"
COLUMNS: Final = (
    *("behaviour", "unit", "stage", "first update", "updates"),
    *("effect", "half-width at 95 %", "grade", "AA-Score"),
)
Row = tuple[str, str, str, int, int, float, float, str, float]


@dataclass(frozen=True)
class Content:
    """What is logged, the same for every tracker."""

    record: AuditRecord
    table: str
    rows: list[Row]
    numbers: dict[str, float]
    """By name, finite ones only."""
    pictures: dict[str, bytes]
    """PNG by name."""


def log(record: AuditRecord, table: str, tracker: Any) -> None:
    """Log an audit, whose table as text is ``table``, to a tracker's run in progress.

    Raises:
        OptionError: if ``tracker`` is of no kind that is known here.
        UnsupportedError: without what the report needs.
    """
    package = type(tracker).__module__.partition(".")[0]
    loggers: dict[str, Callable[[Any, Content], None]] = {
        "mlflow": _to_mlflow,
        "wandb": _to_wandb,
        "tensorboard": _to_tensorboard,
    }
    if getattr(tracker, "__name__", None) == "mlflow" or package == "mlflow":
        kind = "mlflow"
    elif package == "wandb" and hasattr(tracker, "log_artifact"):
        kind = "wandb"
    elif hasattr(tracker, "add_scalar") and hasattr(tracker, "add_image"):
        kind = "tensorboard"
    else:
        raise OptionError(
            f"log_to takes the module mlflow or an mlflow.ActiveRun, a run of wandb.init(), or a"
            f" TensorBoard SummaryWriter; got {type(tracker).__name__}."
        )
    loggers[kind](tracker, _content(record, table))


def _content(record: AuditRecord, table: str) -> Content:
    rows = [
        (
            *(behaviour.name, behaviour.unit, stage.name, stage.start, stage.stop - stage.start),
            *(_number(best_of(stage, q)), stage.intervals[q] if stage.intervals else math.nan),
            *(grade_of(stage, q), stage.scores[q]),
        )
        for q, behaviour in enumerate(record.behaviours)
        for stage in record.stages
    ]
    numbers: dict[str, float] = {}
    for behaviour in record.behaviours:
        _add(numbers, f"{PREFIX}/{_plain(behaviour.name)}/value", behaviour.value)
    for behaviour, _, stage, _, _, effect, *_ in rows:
        _add(numbers, f"{PREFIX}/{_plain(behaviour)}/effect of {_plain(stage)}", effect)
    pictures: dict[str, bytes] = {}
    for behaviour, name, picture in figures(record):
        _add(pictures, f"{PREFIX}/{_plain(behaviour)}/{name}", picture)
    finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
    return Content(record, table, rows, finite, pictures)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _plain(name: str) -> str:
    """A name that MLflow takes: letters, digits, ``_``, ``-``, ``.`` and spaces."""
    return re.sub(r"[^\w\-. ]", "_", name, flags=re.ASCII).strip()[:80] or "unnamed"


def _add(found: dict[str, Any], name: str, value: Any) -> None:
    """Two names that became one stay two."""
    fresh, count = name, 2
    while fresh in found:
        fresh, count = f"{name} {count}", count + 1
    found[fresh] = value


def _files(content: Content, folder: Path) -> list[Path]:
    page, data = folder / "report.html", folder / "audit.json"
    html.write(content.record, page)
    data.write_bytes(encode(content.record))
    return [page, data]


def _to_mlflow(tracker: Any, content: Content) -> None:
    mlflow = sys.modules["mlflow"]
    run = mlflow.active_run() if tracker is mlflow else tracker
    if not hasattr(run, "info"):
        raise OptionError(
            "log_to(mlflow) needs a run in progress: with mlflow.start_run(): audit.log_to(mlflow)."
        )
    client, run_id = mlflow.MlflowClient(), run.info.run_id
    client.set_tag(run_id, f"{PREFIX}.root_digest", content.record.run.root_digest)
    for name, value in content.numbers.items():
        client.log_metric(run_id, name, value)
    client.log_text(run_id, content.table, f"{PREFIX}/table.txt")
    client.log_text(run_id, _markdown(content), f"{PREFIX}/table.md")
    with TemporaryDirectory() as folder:
        for file in _files(content, Path(folder)):
            client.log_artifact(run_id, str(file), PREFIX)
        for name, picture in content.pictures.items():
            file = Path(folder) / f"{name.removeprefix(PREFIX + '/').replace('/', ', ')}.png"
            file.write_bytes(picture)
            client.log_artifact(run_id, str(file), f"{PREFIX}/figures")


def _to_wandb(run: Any, content: Content) -> None:
    wandb, digest = sys.modules["wandb"], content.record.run.root_digest
    run.config.update({f"{PREFIX}/root_digest": digest}, allow_val_change=True)
    # A tag has at most 64 characters; the digest is longer.
    run.tags = (*(run.tags or ()), f"{PREFIX}:{digest.rpartition(':')[2][:32]}")
    run.summary.update(content.numbers)
    with TemporaryDirectory() as folder:
        artifact = wandb.Artifact(
            f"{PREFIX}-audit-{run.id}", type="audit", metadata={"root_digest": digest}
        )
        page, data = _files(content, Path(folder))
        for file in (page, data):
            artifact.add_file(str(file))
        pictures: dict[str, Any] = {}
        for at, (name, picture) in enumerate(content.pictures.items()):
            file = Path(folder) / f"{at}.png"
            file.write_bytes(picture)
            pictures[name] = wandb.Image(str(file), caption=name)
        table = wandb.Table(columns=list(COLUMNS), data=[list(row) for row in content.rows])
        run.log({f"{PREFIX}/table": table, f"{PREFIX}/report": wandb.Html(str(page)), **pictures})
        run.log_artifact(artifact)
    # wandb copied what it was given.


def _to_tensorboard(writer: Any, content: Content) -> None:
    """TensorBoard keeps no files: the report is written beside the event files."""
    step = content.record.run.num_steps
    writer.add_text(f"{PREFIX}/root_digest", content.record.run.root_digest, step)
    for name, value in content.numbers.items():
        writer.add_scalar(name, value, step)
    writer.add_text(f"{PREFIX}/table", _markdown(content), step)
    for name, picture in content.pictures.items():
        writer.add_image(name, _pixels(picture), step, dataformats="HWC")
    folder = writer.log_dir if hasattr(writer, "log_dir") else writer.logdir  # tensorboardX
    page, _ = _files(content, Path(folder))
    writer.add_text(f"{PREFIX}/report", f"The report is the file {page.name} in {folder}.", step)
    writer.flush()


def _markdown(content: Content) -> str:
    rows = [[_cell(value) for value in row] for row in content.rows]
    lines = [list(COLUMNS), ["---"] * len(COLUMNS), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(value: str | int | float) -> str:
    if isinstance(value, float):
        return signed(value)
    text = str(value) if isinstance(value, int) else " ".join(value.split())
    return re.sub(r"([\\|`*_\[\]<>])", r"\\\1", text)


def _pixels(picture: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 ``[height, width, 3]``."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UnsupportedError(
            "figures in TensorBoard need Pillow, which is not installed. Run: pip install"
            " 'culpa[tensorboard]'."
        ) from error
    with Image.open(BytesIO(picture)) as image:
        return np.asarray(image.convert("RGB"), dtype=np.uint8)
