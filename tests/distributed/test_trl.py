"""TRL's trainers on several processes, where TRL is installed: recorded, and replayed alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="trl is not installed: pip install culpa[trl]")
pytest.importorskip("datasets")
pytest.importorskip("peft")

from culpa.integrations.transformers import problem_of, record_trainer
from integrations.test_trl import adapters_of, trainer
from tests.distributed.test_integrations import (
    Trained,
    assert_recorded,
    launched,
    no_accelerator_yet,  # noqa: F401 (a fixture)
    replayed,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.mark.usefixtures("no_accelerator_yet")
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_trainer_of_trl_on_two_processes(kind: str, tmp_path: Path) -> None:
    """Adapters with dropout; its metrics are gathered over the ranks in every loss."""

    def plain(rank: int) -> Trained:
        job = trainer(kind, tmp_path / f"plain-{rank}")
        job.train()
        return adapters_of(job)

    def watched(rank: int) -> Any:
        job = trainer(kind, tmp_path / f"job-{rank}")
        with record_trainer(job, tmp_path / "run", stage=kind):
            job.train()
        return adapters_of(job), replayed(tmp_path / "run", problem_of(job))

    truth, found = (launched(2, tmp_path, work) for work in (plain, watched))
    fresh = problem_of(trainer(kind, tmp_path / "fresh"))
    assert_recorded(tmp_path / "run", fresh, truth, found, 2)
