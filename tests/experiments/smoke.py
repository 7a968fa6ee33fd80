"""Running an experiment's smallest scale, as the tests of each do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import culpa
from culpa.experiments.data.folder import DataFolder
from culpa.experiments.frame.page import write_page
from culpa.experiments.frame.reproduce import reproduce
from culpa.experiments.registry import experiment


def smoke(name: str, folder: Path, data: DataFolder | None = None) -> Any:
    """The result of the smoke scale on bundled data; its page is written and its runs verified."""
    nothing = DataFolder((folder / "no data",))
    result = reproduce(experiment(name), scale="smoke", work=folder, data=data or nothing)
    page, *figures = write_page(result, folder / "pages")
    text = page.read_text()
    assert result.title in text
    assert result.findings.claims
    assert all(claim.text in text for claim in result.findings.claims)
    assert all(f"({figure.relative_to(folder / 'pages')})" in text for figure in figures)
    assert len(figures) == len(result.findings.figures)
    assert str(folder) not in text
    for stand_in in result.findings.stand_ins:
        assert stand_in in text
    verify(result, folder)
    return result


def verify(result: Any, folder: Path) -> None:
    """Every run that the page speaks of is there, and `culpa verify` accepts it."""
    assert result.runs
    for facts in result.runs:
        run = culpa.open_run(folder / "smoke" / result.experiment / "runs" / facts.name)
        assert run.num_steps == facts.updates
        run.verify(root_digest=facts.root_digest)


def part(folder: Path, name: str, key: str) -> Any:
    """The value of a finished part."""
    file = folder / "smoke" / name / "parts" / f"{key}.json"
    return json.loads(file.read_text())["value"]


def claim(result: Any, text: str) -> Any:
    """The claim that begins so."""
    (found,) = [c for c in result.findings.claims if c.text.startswith(text)]
    return found
