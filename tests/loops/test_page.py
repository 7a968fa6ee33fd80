"""docs/loops.md names a test for every line, and each of them is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGE = (ROOT / "docs" / "loops.md").read_text(encoding="utf-8")


def rows() -> list[list[str]]:
    """The cells of every line of a table, headings left out."""
    lines = [line for line in PAGE.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if row[-1] != "Test"]


def defined_in(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_line_has_four_cells_and_a_test_that_exists() -> None:
    assert len(rows()) > 30
    for row in rows():
        assert len(row) == 4, row
        named = re.fullmatch(r"`(?:(tests/\S+?)/)?(\w+\.py)::(\w+)`", row[3])
        assert named, f"no test is named for {row[0]}"
        file = (ROOT / named[1] if named[1] else HERE) / named[2]
        assert named[3] in defined_in(file), row[3]


def test_every_line_says_yes_or_refused() -> None:
    for row in rows():
        assert row[1].startswith(("yes", "refused", "they are no part")), row
        assert row[2].startswith(
            ("yes", "refused", "statistics: refused", "on the", "not trusted")
        ) or (row[2] == "" and not row[1].startswith("yes")), row
