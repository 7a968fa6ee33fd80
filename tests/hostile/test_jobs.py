"""What a manifest says of earlier jobs is recomputed, also where the digests were forged anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import culpa
from hostile import forge


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three jobs: updates 0 to 5, 6 to 8 and 9 to 11."""
    path = forge.record(tmp_path_factory.mktemp("jobs") / "run").path
    forge.append(path, "third")
    forge.append(path, "fourth")
    return path


@pytest.fixture
def run(honest: Path, tmp_path: Path) -> Path:
    return forge.copy_of(honest, tmp_path / "run")


def entry(number: int, at: int, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda fields: fields["jobs"][number].__setitem__(at, value)


EDITS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "stop": entry(0, 0, 5),
    "seconds": entry(1, 1, 0.25),
    "digest": entry(0, 2, "0" * 64),
    "beyond": entry(1, 0, 10**6),
    "whole": entry(1, 0, 12),
    "backwards": lambda fields: fields["jobs"].reverse(),
    "missing": lambda fields: fields["jobs"].pop(0),
    "twice": lambda fields: fields["jobs"].insert(0, fields["jobs"][0]),
    "none": lambda fields: fields.update(jobs=[]),
}


def test_it_is_whole(run: Path) -> None:
    forge.examine(run)
    assert [job.stop for job in culpa.open_run(run).manifest.earlier] == [6, 9]


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_the_jobs_is_seen(edit: str, run: Path) -> None:
    forge.edit_manifest(run, EDITS[edit])
    with pytest.raises(culpa.IntegrityError):
        forge.examine(run)


@pytest.mark.parametrize("edit", sorted(EDITS.keys() - {"none"}))
def test_also_with_root_and_seal_forged_anew(edit: str, run: Path) -> None:
    forge.edit_manifest(run, EDITS[edit])
    forge.reseal(run)
    with pytest.raises(culpa.IntegrityError, match="jobs: job"):
        forge.examine(run)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE stage SET name = 'other' WHERE name = 'first'",
        "UPDATE stage SET stop = 10 WHERE name = 'third'",
        "DELETE FROM state WHERE k = 4",
    ],
)
def test_a_change_of_an_earlier_job_does_not_fit_its_digest(statement: str, run: Path) -> None:
    if "stop" in statement:
        forge.sql(run, "UPDATE stage SET start = 10 WHERE name = 'fourth'")
    forge.sql(run, statement)
    if "state" in statement:
        (run / "states/000000004.safetensors").unlink()
    forge.reseal(run)
    with pytest.raises(culpa.IntegrityError, match="jobs: job"):
        forge.examine(run)


def test_a_seal_of_before_is_taken_only_while_nothing_is_recorded(run: Path) -> None:
    """The manifest of a crash just after a job began, on a log that has more."""

    def reopened(fields: dict[str, Any]) -> None:
        ended = [12, fields["plain_seconds"], fields["root_digest"]]
        fields.update(status="recording", root_digest="", num_steps=0, plain_seconds=0.0)
        fields["jobs"].append(ended)

    forge.edit_manifest(run, reopened)
    forge.examine(run)
    forge.edit_manifest(run, lambda fields: fields["jobs"].pop())
    forge.examine(run)  # as a crash just before the end left it
    forge.edit_manifest(run, lambda fields: fields["jobs"].pop())
    with pytest.raises(culpa.IntegrityError, match="seal"):
        forge.examine(run)


def test_a_job_that_never_was(tmp_path: Path) -> None:
    """Anyone can compute the digest that the first stage would have had as a run of its own."""
    path = forge.record(tmp_path / "run").path
    open_ended = {"status": "recording", "root_digest": "", "num_steps": 0, "plain_seconds": 0.0}
    claimed: list[Any] = [3, 0.0, "0" * 64]
    forge.edit_manifest(path, lambda fields: fields.update(open_ended, jobs=[claimed]))
    with pytest.raises(culpa.IntegrityError, match="first 3 updates is") as told:
        forge.examine(path)
    claimed[2] = str(told.value).rstrip(".").split()[-1]
    forge.edit_manifest(path, lambda fields: fields.update(jobs=[claimed]))
    with pytest.raises(culpa.IntegrityError, match="seal"):
        forge.examine(path)
