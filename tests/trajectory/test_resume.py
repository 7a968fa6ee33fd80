"""Going on with a recording: the same script, and what must not be passed over in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

import culpa
from crash.harness import fingerprint, loss, train
from hostile import forge


class Stop(Exception):  # noqa: N818
    pass


def stop_at(k: int) -> Callable[[int], None]:
    def progress(done: int) -> None:
        if done == k:
            raise Stop

    return progress


@pytest.mark.parametrize("k", [1, 24, 25, 26, 50, 73])
def test_an_interrupted_run_goes_on(k: int, tmp_path: Path) -> None:
    truth = fingerprint(train(tmp_path / "truth"))
    with pytest.raises(Stop):
        train(tmp_path / "run", stop_at(k))
    assert culpa.open_run(tmp_path / "run").num_steps == k
    assert fingerprint(train(tmp_path / "run", resume=True)) == truth
    run = culpa.open_run(tmp_path / "run")
    assert run.manifest.status == "complete"
    assert run.verify(level="digest").finished
    assert [(s.name, len(s)) for s in run.stages] == [
        ("plain", 25),
        ("augmented", 25),
        ("again", 25),
    ]


def test_a_complete_run_is_not_resumed(tmp_path: Path) -> None:
    train(tmp_path / "run", epochs=1)
    root = culpa.open_run(tmp_path / "run").root_digest
    with pytest.raises(culpa.StoreError, match="complete run"):
        train(tmp_path / "run", epochs=1, resume=True)
    assert culpa.open_run(tmp_path / "run").root_digest == root


def by_steps(path: Path, stop: int | None = None, seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    batches = [(torch.randn(4, 3), torch.randint(0, 2, (4,))) for _ in range(20)]
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = StepLR(optimizer, 3)
    options.setdefault("scheduler", scheduler)
    problem = culpa.Problem(model, loss)
    with culpa.record(path, problem, optimizer, **options) as recorder:
        for k in range(recorder.num_steps, 20):
            with recorder.step(batches[k]):
                optimizer.zero_grad()
                loss(model, batches[k]).backward()
                optimizer.step()
            scheduler.step()
            if k == stop:
                raise Stop
    return model


def test_loops_of_steps_begin_where_the_record_goes_on(tmp_path: Path) -> None:
    truth = by_steps(tmp_path / "truth")
    with pytest.raises(Stop):
        by_steps(tmp_path / "run", stop=11)
    model = by_steps(tmp_path / "run", resume=True)
    assert fingerprint(dict(model.state_dict())) == fingerprint(dict(truth.state_dict()))


def test_other_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        by_steps(tmp_path / "run", stop=11)
    with pytest.raises(culpa.RecordError, match=r"update \d+, made again"):
        by_steps(tmp_path / "run", seed=1, resume=True)
    assert culpa.open_run(tmp_path / "run").num_steps == 12  # nothing was lost by trying


def test_a_scheduler_that_was_not_passed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        by_steps(tmp_path / "run", stop=11, scheduler=None)
    with pytest.raises(culpa.OptionError, match="scheduler"):
        by_steps(tmp_path / "run", resume=True, scheduler=None)


def test_a_script_that_ends_early_is_told(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(tmp_path / "run", stop_at(60))
    with pytest.raises(culpa.RecordError):
        train(tmp_path / "run", epochs=1, resume=True)


def test_killed_while_the_log_was_closed(tmp_path: Path) -> None:
    """All is there but the manifest of the end, and a journal that SQLite had begun."""
    path = forge.record(tmp_path / "run").path
    unfinished = {"status": "recording", "root_digest": "", "num_steps": 0, "plain_seconds": 0.0}
    forge.edit_manifest(path, lambda fields: fields.update(unfinished))
    (path / "log.sqlite-journal").write_bytes(bytes(512))
    model = forge.problem()
    optimizer = torch.optim.AdamW(model.model.parameters())
    with (
        pytest.raises(culpa.StoreError, match="complete run"),
        culpa.record(path, model, optimizer, resume=True),
    ):
        raise AssertionError
    assert culpa.open_run(path).verify().finished


def test_nothing_there_is_a_new_run(tmp_path: Path) -> None:
    by_steps(tmp_path / "run", resume=True)
    assert culpa.open_run(tmp_path / "run").num_steps == 20


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0), (-1.0, 5)])
def test_durability_checks_itself(numbers: tuple[float, int]) -> None:
    with pytest.raises(culpa.OptionError):
        culpa.Durability(*numbers)
