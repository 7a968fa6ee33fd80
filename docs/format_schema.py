"""Writes docs/format.schema.json from the structures that the reader checks files with.

Run it after changing them: ``python docs/format_schema.py``. A test fails when the file is stale.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from culpa.trajectory import log
from culpa.trajectory.chain import StepDetail, StoredMicroBatch
from culpa.trajectory.layout import Layout
from culpa.trajectory.rng import RandomState
from culpa.trajectory.schema import FORMAT, Manifest, OptimizerSpec
from culpa.trajectory.tables import Hypers
from culpa.trajectory.tensors import Entry

TARGET = Path(__file__).with_name("format.schema.json")
VALUES: dict[str, tuple[Any, str]] = {
    "manifest": (Manifest, "culpa.json"),
    "header": (dict[str, Entry], "the JSON header of states/*.safetensors"),
    "layout": (Layout, "layout.json"),
    "optimizer": (OptimizerSpec, "optimizer.json"),
    "hypers": (Hypers, "hypers.json"),
    "detail": (StepDetail, "step.detail"),
    "micro_batches": (list[StoredMicroBatch], "step.micro_batches, MessagePack; strings are bin"),
    "random": (RandomState, "random.state, MessagePack; strings are bin"),
}


def schema() -> dict[str, Any]:
    """The whole format as JSON Schema: one property for each kind of value, and the tables."""
    found, definitions = msgspec.json.schema_components(
        [kind for kind, _ in VALUES.values()], ref_template="#/$defs/{name}"
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"culpa run folder, format {FORMAT}",
        "type": "object",
        "properties": {
            name: {"description": where, **value}
            for (name, (_, where)), value in zip(VALUES.items(), found, strict=True)
        },
        "$defs": definitions,
        "x-tables": [line.strip() for line in log.SCHEMA.strip().split(";") if line.strip()],
    }


def text() -> str:
    """The bytes of the file."""
    return json.dumps(schema(), indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
    sys.stdout.write(f"{TARGET}\n")
