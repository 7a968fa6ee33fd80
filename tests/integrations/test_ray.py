"""Replays as Ray tasks: the same audit, whatever becomes of a worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

ray = pytest.importorskip("ray")

import culpa
from culpa.integrations.ray import Ray
from oracles import fanned
from oracles.fanned import audit, without_times

pytestmark = pytest.mark.filterwarnings("ignore")  # ray's own, at start and end


@pytest.fixture(scope="module")
def marks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("marks")


@pytest.fixture(scope="module", autouse=True)
def cluster(marks: Path) -> Iterator[None]:
    tests = str(Path(__file__).resolve().parents[1])
    variables = {fanned.MARKS: str(marks), "OMP_NUM_THREADS": "1", "PYTHONPATH": tests}
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80 * 2**20,
        runtime_env={"env_vars": variables},
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> culpa.Run:
    return fanned.train(tmp_path_factory.mktemp("fanned") / "run")


def test_an_audit_by_ray_is_the_audit(run: culpa.Run) -> None:
    assert without_times(audit(run, executor=Ray(fanned.make))) == without_times(audit(run))


def test_a_lost_workers_task_runs_again(run: culpa.Run, marks: Path) -> None:
    found = audit(run, executor=Ray(fanned.make_in_the_second_worker))
    assert (marks / "killed").exists()
    assert without_times(found) == without_times(audit(run))


def test_workers_that_are_all_lost_end_the_audit(run: culpa.Run) -> None:
    with pytest.raises(culpa.UnsupportedError, match="lost its worker 2 times"):
        audit(run, executor=Ray(fanned.make_never, retries=1))


def test_a_worker_that_builds_something_else_is_refused(run: culpa.Run) -> None:
    with pytest.raises(culpa.OptionError, match="make_another builds another problem"):
        audit(run, executor=Ray(fanned.make_another))
