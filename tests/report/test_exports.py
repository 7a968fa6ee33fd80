"""The audit outside of its page: model card, tables, figures, and the schema of its JSON."""

from __future__ import annotations

import html.parser
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

import culpa
from culpa.auditing.record import AuditRecord, encode
from culpa.report.markdown import plain

DOCS = Path(__file__).parents[2] / "docs"


def test_the_section_of_a_model_card(record: AuditRecord) -> None:
    text = culpa.Audit(record).to_markdown()
    lines = text.splitlines()
    assert lines[0] == "## Training accountability"
    assert [line for line in lines if line.startswith("#")].count(lines[0]) == 1
    assert record.run.root_digest in text
    for behaviour in record.behaviours:
        assert f"### {behaviour.name}" in lines
    tables = [line for line in lines if line.startswith("|")]
    assert len(tables) == len(record.behaviours) * (len(record.stages) + 2)
    assert {line.count("|") for line in tables} == {6}
    assert record.verdicts[0].split("'")[0] in text.replace("\\", "")
    assert all(caution[:30] in text.replace("\\", "") for caution in record.cautions)


def test_no_name_acts_in_markdown(build: Callable[..., AuditRecord]) -> None:
    hostile = "[a](http://x) <img src=y> | ![p](z) `c` **b** # h"
    text = culpa.Audit(build(stages=[hostile, "b"], behaviours=[(hostile, hostile)])).to_markdown()
    assert {line.count(" | ") for line in text.splitlines() if line.startswith("|")} <= {4, 5}

    class Tags(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attrs: Any) -> None:
            raise AssertionError(tag)

    Tags().feed(text.replace("\\<", "&lt;"))
    assert "](http" not in text.replace("[culpa](https://arxiv.org/abs/2506.00175)", "")
    assert "\\[a\\]\\(http\\://x\\)" in text
    assert plain("- a: b-c +1, www.d.e") == "\\- a: b-c +1, www\\.d.e"


def test_tables_hold_every_number(record: AuditRecord, tmp_path: Path) -> None:
    polars = pytest.importorskip("polars", reason="needs: pip install 'culpa[tables]'")
    scores = [
        [math.nan, *row[1:]] if k == 3 else row for k, row in enumerate(record.updates.scores)
    ]
    updates = msgspec.structs.replace(record.updates, scores=scores)
    record = msgspec.structs.replace(record, updates=updates)
    written = culpa.Audit(record).to_parquet(tmp_path / "tables")
    read = {path.stem: polars.read_parquet(path) for path in written}
    stages, behaviours = len(record.stages), len(record.behaviours)
    assert read["stages"].shape[0] == stages * behaviours
    assert read["updates"].shape[0] == record.run.num_steps * behaviours
    one = read["stages"].row(behaviours, named=True)  # the second stage on the first behaviour
    assert (one["stage"], one["replayed"]) == (record.stages[1].name, record.stages[1].replayed[0])
    assert one["effect"] == record.stages[1].replayed[0]
    assert read["updates"]["score"].to_list()[3 * behaviours] is None
    assert read["updates"]["score"].to_list()[4 * behaviours] == record.updates.scores[4][0]
    assert {path.suffix for path in written} == {".parquet"}


@pytest.mark.parametrize(("kind", "magic"), [("png", b"\x89PNG"), ("svg", b"<svg")])
def test_figures_are_files(record: AuditRecord, tmp_path: Path, kind: str, magic: bytes) -> None:
    pytest.importorskip("vl_convert", reason="needs: pip install 'culpa[report]'")
    pytest.importorskip("altair", reason="needs: pip install 'culpa[report]'")
    written = culpa.Audit(record).to_figures(tmp_path / "figures", kind)
    wanted = [
        f"{name}-{q}.{kind}"
        for q in range(len(record.behaviours))
        for name in ("stages", "updates")
    ]
    assert [path.name for path in written] == wanted
    assert all(path.read_bytes().startswith(magic) for path in written)
    with pytest.raises(culpa.OptionError, match="png or svg"):
        culpa.Audit(record).to_figures(tmp_path, "gif")


def schema_script() -> Any:
    spec = importlib.util.spec_from_file_location("audit_schema", DOCS / "audit_schema.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_schema_is_that_of_this_version() -> None:
    there = (DOCS / "audit.schema.json").read_text(encoding="utf-8")
    assert there == schema_script().text(), "stale: run python docs/audit_schema.py"


def test_audits_satisfy_the_schema(build: Callable[..., AuditRecord]) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs: pip install jsonschema")
    schema = json.loads((DOCS / "audit.schema.json").read_text(encoding="utf-8"))
    record = build()
    wild = msgspec.structs.replace(record.stages[0], effects=[math.nan] * len(record.behaviours))
    for one in (record, msgspec.structs.replace(record, stages=[wild, *record.stages[1:]])):
        jsonschema.validate(json.loads(encode(one)), schema)
    broken = json.loads(encode(record))
    broken["stages"][0]["effects"] = "none"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(broken, schema)
