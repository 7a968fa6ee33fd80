"""Writes docs/audit.schema.json from the structure of an audit's JSON.

Run it after changing the structure: ``python docs/audit_schema.py``. A test fails when the file is
stale.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from culpa.auditing.record import AUDIT_FORMAT, AuditRecord

TARGET = Path(__file__).with_name("audit.schema.json")


def schema() -> dict[str, Any]:
    """JSON Schema of what ``audit.to_json`` writes; a number that is not finite is ``null``."""
    (found,), definitions = msgspec.json.schema_components(
        [AuditRecord], ref_template="#/$defs/{name}"
    )
    whole = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"culpa audit, format {AUDIT_FORMAT}",
        **found,
        "$defs": definitions,
    }
    return _nullable(whole)


def _nullable(value: Any) -> Any:
    if isinstance(value, dict):
        found = {name: _nullable(part) for name, part in value.items()}
        return found | {"type": ["number", "null"]} if found.get("type") == "number" else found
    return [_nullable(part) for part in value] if isinstance(value, list) else value


def text() -> str:
    """The bytes of the file."""
    return json.dumps(schema(), indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
    sys.stdout.write(f"{TARGET}\n")
