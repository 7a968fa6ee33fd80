"""docs/format.md is true: its checker, its tables and its schema are held against real runs."""

from __future__ import annotations

import importlib.util
import json
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import msgpack
import pytest

import culpa
from culpa.trajectory import log
from culpa.trajectory.schema import FORMAT, LOG, MANIFEST, PACK, Manifest, state_name
from hostile import forge

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "format.md").read_text(encoding="utf-8")
CHECKER = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)[-1]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return forge.record(tmp_path_factory.mktemp("format") / "run").path


@pytest.fixture
def run(honest: Path, tmp_path: Path) -> Path:
    return forge.copy_of(honest, tmp_path / "run")


def check(run: Path) -> subprocess.CompletedProcess[str]:
    """Run the page's checker in an interpreter that cannot import culpa, torch or msgspec."""
    guard = "import sys\nfor name in ('culpa', 'torch', 'msgspec', 'numpy', 'safetensors'):\n"
    program = f"{guard}    sys.modules[name] = None\n{CHECKER}"
    return subprocess.run(
        [sys.executable, "-I", "-c", program, str(run)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_the_checker_on_the_page_finds_the_root_digest(run: Path) -> None:
    done = check(run)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == culpa.open_run(run).root_digest


def test_the_checker_on_the_page_recomputes_the_jobs(run: Path) -> None:
    first = culpa.open_run(run).root_digest
    forge.append(run, "third")
    forge.append(run, "fourth")
    done = check(run)
    assert done.returncode == 0, done.stderr
    longer = culpa.open_run(run)
    assert done.stdout.strip() == longer.root_digest != first
    assert longer.manifest.earlier[0].root_digest == first
    forge.edit_manifest(run, lambda fields: fields["jobs"][0].__setitem__(2, "0" * 64))
    assert "job 0 is another" in check(run).stderr


@pytest.mark.parametrize("name", [PACK, state_name(2), state_name(6), "states/frozen.safetensors"])
def test_the_checker_on_the_page_notices_changes(name: str, run: Path) -> None:
    forge.flip(run / name, (run / name).stat().st_size - 1)
    assert check(run).returncode != 0


def test_the_checker_on_the_page_notices_another_learning_rate(run: Path) -> None:
    forge.sql(
        run, "UPDATE hypers SET json = CAST(replace(CAST(json AS TEXT), '0.05', '0.5') AS BLOB)"
    )
    assert check(run).returncode != 0


def schema_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("format_schema", DOCS / "format_schema.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_schema_is_that_of_the_reader() -> None:
    there = (DOCS / "format.schema.json").read_text(encoding="utf-8")
    assert there == schema_script().text(), "stale: run python docs/format_schema.py"
    assert f"format {FORMAT}" in json.loads(there)["title"]


def text_for_bytes(value: Any) -> Any:
    """MessagePack as JSON Schema can look at it."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list):
        return [text_for_bytes(item) for item in value]
    return {k: text_for_bytes(v) for k, v in value.items()} if isinstance(value, dict) else value


def values(run: Path) -> dict[str, list[Any]]:
    """Every JSON and MessagePack value of a run, by its name in the schema."""
    connection = sqlite3.connect(run / LOG)
    found: dict[str, list[Any]] = {"manifest": [json.loads((run / MANIFEST).read_bytes())]}
    for name in ("layout", "optimizer", "hypers"):
        found[name] = [json.loads(b) for (b,) in connection.execute(f"SELECT json FROM {name}")]
    query = connection.execute("SELECT detail, micro_batches FROM step").fetchall()
    found["detail"] = [json.loads(detail) for detail, _ in query]
    found["micro_batches"] = [text_for_bytes(msgpack.unpackb(micro)) for _, micro in query]
    states = connection.execute("SELECT state FROM random").fetchall()
    found["random"] = [text_for_bytes(msgpack.unpackb(state)) for (state,) in states]
    connection.close()
    data = (run / state_name(2)).read_bytes()
    found["header"] = [json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])]
    return found


def test_a_real_run_obeys_the_schema(run: Path) -> None:
    schema = json.loads((DOCS / "format.schema.json").read_text(encoding="utf-8"))
    found = values(run)
    assert found.keys() == schema["properties"].keys()
    for name, instances in found.items():
        assert instances
        for instance in instances:
            whole = {"$defs": schema["$defs"], **schema["properties"][name]}
            jsonschema.Draft202012Validator(whole).validate(instance)
    whole = {"$defs": schema["$defs"], **schema["properties"]["manifest"]}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**found["manifest"][0], "execute": "x"}, whole)


def cells(heading: str) -> list[str]:
    """The first column of the first table under a heading of the page."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)


def test_the_page_lists_every_field_of_the_manifest_in_order() -> None:
    assert cells("culpa.json") == list(Manifest.__struct_fields__)


def test_the_page_lists_every_table_and_column() -> None:
    assert cells("log.sqlite") == re.findall(r"CREATE TABLE (\w+)", log.SCHEMA)
    section = PAGE.split("\n## log.sqlite\n")[1].split("\n## ")[0]
    for column in re.findall(r"(\w+) +(?:INTEGER|BLOB|TEXT)", log.SCHEMA):
        assert f"`{column}`" in section, f"format.md does not mention the column {column}"


def test_the_page_names_every_file(run: Path) -> None:
    layout = PAGE.split("```text\n")[1].split("```")[0]
    known = re.sub(r"\d{9}", "N", layout)
    for file in run.rglob("*"):
        if file.is_file():
            assert re.sub(r"\d{9}", "N", file.relative_to(run).as_posix()) in known
