"""``culpa reproduce`` from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

import culpa
from culpa.cli import reproduce as command
from culpa.cli.app import app
from culpa.experiments.registry import MODULES


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["reproduce", *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command's console prints; it was made before pytest put its own output there."""
    with command.out.capture() as held:
        run(*arguments)
    return " ".join(held.get().split())


def test_without_a_name_it_lists_the_experiments(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys)
    assert all(name in text for name in MODULES)


def test_it_writes_a_page_and_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "data").mkdir()
    arguments = ("mnist-shift", "--scale", "smoke", "--data", str(tmp_path / "data"))
    places = ("--out", str(tmp_path / "pages"), "--work", str(tmp_path / "work"))
    text = said(capsys, *arguments, *places)
    assert "mnist-shift: Three jobs on turned digits" in text
    assert "Stand-in: scikit-learn" in text
    assert "Recorded runs, each accepted by culpa verify: 1 in" in text
    page = tmp_path / "pages" / "mnist-shift.md"
    before = page.read_text()
    kept = tmp_path / "work" / "smoke" / "mnist-shift" / "parts" / "seed-0.json"
    made = kept.stat().st_mtime_ns
    said(capsys, *arguments, *places)
    assert kept.stat().st_mtime_ns == made
    assert page.read_text() == before


def test_what_does_not_exist_is_told(tmp_path: Path) -> None:
    for arguments, words in (
        (("no-such",), "there is no experiment 'no-such'"),
        (("table1", "--scale", "huge"), "paper, small, smoke"),
        (("table1", "--data", str(tmp_path / "no")), "does not exist"),
    ):
        with pytest.raises(culpa.OptionError, match=words):
            run(*arguments)


def test_the_papers_scale_needs_the_papers_data(tmp_path: Path) -> None:
    with pytest.raises(culpa.OptionError, match="MNIST is not in"):
        run("mnist-shift", "--scale", "paper", "--data", str(tmp_path), "--work", str(tmp_path))
