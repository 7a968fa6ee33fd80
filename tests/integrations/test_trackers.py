"""``audit.log_to`` with the real packages: what was logged is read back through their own readers.

MLflow and Weights & Biases are not among the development dependencies (thirty packages each); their
tests run where they are installed.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from culpa.errors import OptionError
from culpa.report.audit import Audit
from report.records import make_record

HOSTILE = [("acc/urac|y <b>", "points"), ("acc_urac_y _b_", "nats"), ("Güte\nvar(--x)", "nats")]
NAMES = ["acc_urac_y _b_", "acc_urac_y _b_ 2", "G_te_var_--x_"]
STAGES = ["one", "two|x", "containerSize()[0]"]


def audit() -> Audit:
    return Audit(make_record(stages=STAGES, behaviours=HOSTILE, steps=30))


def expected(found: Audit) -> dict[str, float]:
    """The numbers by name; the third stage's effects are replayed ones, the first's estimates."""
    first, last = found.record.stages[0], found.record.stages[2]
    assert first.replayed[0] is None
    assert last.replayed[2] is not None
    return {
        "culpa/acc_urac_y _b_/value": found.record.behaviours[0].value,
        "culpa/acc_urac_y _b_/effect of one": first.effects[0],
        "culpa/acc_urac_y _b_/effect of one 2": first.effects[1],
        "culpa/G_te_var_--x_/effect of containerSize___0_": last.replayed[2],
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    found = audit()
    with SummaryWriter(str(tmp_path)) as writer:
        found.log_to(writer)
    read = EventAccumulator(str(tmp_path))
    read.Reload()
    tags: Any = read.Tags()
    assert len(tags["scalars"]) == 3 + 9
    for name, value in expected(found).items():
        event = read.Scalars(name)[0]
        assert event.step == 30
        assert event.value == pytest.approx(value, rel=1e-6)
    assert len(tags["images"]) == 6
    picture = read.Images(tags["images"][0])[0]
    assert picture.width == 1520
    assert picture.encoded_image_string.startswith(b"\x89PNG")
    texts = {
        tag: read.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in tags["tensors"]
    }
    assert texts["culpa/root_digest/text_summary"] == found.record.run.root_digest
    assert texts["culpa/table/text_summary"].count("\n") == 2 + 9
    assert "| acc/urac\\|y \\<b\\> |" in texts["culpa/table/text_summary"]
    assert str(tmp_path) in texts["culpa/report/text_summary"]
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    assert Audit.load(tmp_path / "audit.json").record.run == found.record.run


@pytest.mark.filterwarnings("ignore")  # a tracker's dependencies, not ours
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: pip install mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)
    found = audit()
    mlflow.set_tracking_uri(tmp_path.joinpath("runs").as_uri())
    with pytest.raises(OptionError, match="needs a run in progress"):
        found.log_to(mlflow)
    with mlflow.start_run() as run:
        found.log_to(mlflow)
    again = mlflow.start_run()
    mlflow.end_run()
    found.log_to(again)
    for run_id in (run.info.run_id, again.info.run_id):
        read = mlflow.MlflowClient().get_run(run_id)
        assert read.data.tags["culpa.root_digest"] == found.record.run.root_digest
        assert len(read.data.metrics) == 3 + 9
        assert expected(found).items() <= read.data.metrics.items()
        files = {f.path for f in mlflow.MlflowClient().list_artifacts(run_id, "culpa")}
        parts = ("report.html", "audit.json", "table.txt", "table.md", "figures")
        assert files == {f"culpa/{part}" for part in parts}
        assert len(mlflow.MlflowClient().list_artifacts(run_id, "culpa/figures")) == 6


@pytest.mark.filterwarnings("ignore")
def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    found = audit()
    with wandb.init(mode="offline", project="culpa", dir=tmp_path, tags=["mine"]) as run:
        found.log_to(run)
        digest = found.record.run.root_digest
        assert run.config["culpa/root_digest"] == digest
        assert run.tags == ("mine", f"culpa:{digest.removeprefix('blake3:')[:32]}")
        for name, value in expected(found).items():
            assert run.summary[name] == pytest.approx(value)
        folder = Path(run.dir)
    media = folder / "media"
    table = json.loads(next((media / "table").rglob("*.json")).read_text())
    assert table["columns"][:3] == ["behaviour", "unit", "stage"]
    assert [row[0] for row in table["data"]] == [b for b, _ in HOSTILE for _ in STAGES]
    assert all(math.isfinite(row[5]) for row in table["data"])
    assert len(list((media / "images").rglob("*.png"))) == 6
    assert next((media / "html").rglob("*.html")).read_text().count("<!doctype html>") == 1
    staged = {file.name.partition("-")[0] for file in tmp_path.rglob("staging/*")}
    assert staged  # the artifact's files wait for `wandb sync`


def test_what_is_no_tracker_is_named() -> None:
    with pytest.raises(OptionError, match="got list"):
        audit().log_to([])
