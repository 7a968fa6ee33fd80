"""The audit as tables in Parquet files, by Polars: for whoever computes on with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from culpa.auditing.record import AuditRecord
from culpa.errors import StoreError, UnsupportedError
from culpa.report.matrix import best_of
from culpa.report.numbers import finite
from culpa.report.panels import grade_of
from culpa.report.record_check import checked

Rows = list[dict[str, Any]]


def tables(record: AuditRecord) -> dict[str, Rows]:
    """Long tables by name, one row a fact; what is not finite or not known is ``None``.

    stages: stage x behaviour. updates: update x behaviour. layers: stage x behaviour x layer.
    examples: behaviour x training example.
    """
    record = checked(record)
    return {
        "stages": _stages(record),
        "updates": _updates(record),
        "layers": [
            {
                "stage": split.stage,
                "behaviour": split.behaviour,
                "layer": layer,
                "effect": finite(value),
            }
            for split in record.layers
            for layer, value in split.effects.items()
        ],
        "examples": [
            {
                "behaviour": found.behaviour,
                "example": int(number),
                "score": finite(score),
                "updates": found.updates.get(number, []),
            }
            for found in record.examples
            for number, score in found.scores.items()
        ],
    }


def _stages(record: AuditRecord) -> Rows:
    return [
        {
            "stage": stage.name,
            "start": stage.start,
            "stop": stage.stop,
            "behaviour": behaviour.name,
            "unit": behaviour.unit,
            "effect": finite(best_of(stage, q)),
            "half_width": finite(stage.intervals[q]) if stage.intervals else None,
            "grade": grade_of(stage, q),
            "replayed": finite(stage.replayed[q]),
            "estimated": finite(stage.effects[q]) if stage.estimated else None,
            "score": finite(stage.scores[q]),
            "floor": finite(stage.floors[q]) if stage.floors else None,
        }
        for stage in record.stages
        for q, behaviour in enumerate(record.behaviours)
    ]


def _updates(record: AuditRecord) -> Rows:
    every = record.updates
    names = [(s.name, s.start, s.stop) for s in record.stages]
    return [
        {
            "update": k,
            "stage": next((name for name, start, stop in names if start <= k < stop), None),
            "behaviour": behaviour.name,
            "score": finite(every.scores[k][q]),
            "grade": every.grades[k],
            "growth": finite(every.growth[k]),
            "displacement": finite(every.displacement[k]),
            "learning_rate": finite(every.learning_rates[k]),
        }
        for k in range(len(every.scores))
        for q, behaviour in enumerate(record.behaviours)
    ]


def write(record: AuditRecord, folder: Path) -> list[Path]:
    """Write every table that has rows as ``folder/NAME.parquet``; the files, in order.

    Raises:
        UnsupportedError: without Polars.
        StoreError: if a file cannot be written.
    """
    try:
        import polars
    except ImportError as error:
        raise UnsupportedError(
            "Parquet tables need Polars, which is not installed. Run: pip install 'culpa[tables]'."
        ) from error
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in tables(record).items():
            if rows:
                written.append(folder / f"{name}.parquet")
                polars.DataFrame(rows, infer_schema_length=None).write_parquet(written[-1])
    except OSError as error:
        raise StoreError(f"cannot write tables into {folder}: {error}.") from error
    return written
