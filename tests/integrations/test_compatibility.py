"""docs/compatibility.md is what docs/compatibility.py makes of the tests as they are."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs"


def script() -> Any:
    spec = importlib.util.spec_from_file_location("compatibility", DOCS / "compatibility.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current() -> None:
    there = (DOCS / "compatibility.md").read_text(encoding="utf-8")
    assert there == script().text(), "stale: run python docs/compatibility.py"


def test_a_cell_says_yes_only_where_a_test_calls_it() -> None:
    made = script()
    adapters = next(test for name, test in made.INTEGRATIONS if "PEFT" in name)
    assert made.cells((adapters,)) == ["yes", "yes", "", ""]
    assert made.cells((adapters,), recorded="refused") == ["no", "no", "", ""]
    assert made.cells((made.MODELS,), modelled="refused") == ["yes", "yes", "no", "no"]
    assert made.cells((made.MODELS,)) == ["yes"] * 4
