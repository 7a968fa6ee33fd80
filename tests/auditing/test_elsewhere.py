"""Replays in other processes: the same audit, whatever becomes of a worker."""

from __future__ import annotations

from pathlib import Path

import pytest

import culpa
from oracles import fanned
from oracles.fanned import audit, without_times


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> culpa.Run:
    return fanned.train(tmp_path_factory.mktemp("fanned") / "run")


def test_an_audit_by_processes_is_the_audit(run: culpa.Run) -> None:
    with culpa.Processes(fanned.make, workers=2) as executor:
        found = audit(run, executor=executor)
    assert sum("replay without" in spent.what for spent in found.spent) == fanned.STAGES
    assert without_times(found) == without_times(audit(run))
    assert executor.lost == 0


def test_a_dead_workers_task_runs_again(
    run: culpa.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(fanned.MARKS, str(tmp_path))
    with culpa.Processes(fanned.make_in_the_second_worker, workers=1) as executor:
        found = audit(run, executor=executor)
    assert executor.lost == 1
    assert without_times(found) == without_times(audit(run))


def test_workers_that_all_die_end_the_audit_and_keep_what_was_found(
    run: culpa.Run, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    with (
        culpa.Processes(fanned.make_never, workers=1, retries=1) as executor,
        pytest.raises(culpa.UnsupportedError, match="2 worker processes died"),
    ):
        audit(run, work=work, executor=executor)
    assert without_times(audit(run, work=work)) == without_times(audit(run))


def test_a_worker_that_builds_something_else_is_refused(run: culpa.Run) -> None:
    with (
        culpa.Processes(fanned.make_another, workers=1) as executor,
        pytest.raises(culpa.OptionError, match="make_another builds another problem"),
    ):
        audit(run, executor=executor)


def test_no_workers_are_refused() -> None:
    with pytest.raises(culpa.OptionError, match="at least one worker"):
        culpa.Processes(fanned.make, workers=0)


def test_a_function_that_no_worker_can_import_is_refused() -> None:
    with pytest.raises(culpa.OptionError, match="at the top of a module"):
        culpa.Processes(lambda: fanned.make())  # noqa: PLW0108 (the very thing that is refused)
