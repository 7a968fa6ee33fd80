"""A training that is over, executed again from what its ``transformers.Trainer`` left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("transformers")
# transformers, peft and their dependencies deprecate each other's functions.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

import culpa
from culpa.errors import (
    NotReproducibleError,
    OptionError,
    StoreError,
    UnsupportedError,
)
from culpa.integrations.trainer_checks import checks_of
from culpa.integrations.trainer_output import Drifted, from_trainer_output
from culpa.integrations.transformers import problem_of, record_trainer
from integrations.llama import collate, sentences
from integrations.over import Masking, contents, job, same, weights


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """What a training left, and its final weights."""
    folder = tmp_path_factory.mktemp("finished") / "output"
    first = job(folder)
    first.train()
    return folder, weights(first.model)


@pytest.fixture
def output(finished: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(finished[0], tmp_path / "output"))


def test_it_is_the_run_that_would_have_been_recorded(
    finished: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder, final = finished
    before = contents(folder)
    again = job(folder)
    run = from_trainer_output(folder, again, path=tmp_path / "run")
    assert contents(folder) == before  # neither a checkpoint nor a log was written
    assert [(s.name, s.start, s.stop) for s in run.stages] == [
        ("train 0-2", 0, 2),
        ("train 2-4", 2, 4),
        ("train 4-6", 4, 6),
    ]
    checks = checks_of(run)
    assert [(c.start, c.step, c.bitwise, c.drift) for c in checks] == [
        (0, 2, True, 0.0),
        (2, 4, True, 0.0),
        (4, 6, True, 0.0),
    ]
    assert all(c.compared == ("model", "optimizer", "scheduler") for c in checks)
    assert all(c.generators for c in checks)
    assert same(final, run.final_state())
    assert same(final, weights(again.model))

    live = job(tmp_path / "live")
    with record_trainer(live, tmp_path / "recorded", stage="train"):
        live.train()
    recorded = culpa.open_run(tmp_path / "recorded")
    problem = problem_of(job(tmp_path / "fresh"))
    kept = set(run.kept_states) & set(recorded.kept_states)
    assert {0, 6} <= kept
    assert all(run.state(k).digest() == recorded.state(k).digest() for k in kept)
    behaviour = culpa.behaviours.sequence_log_likelihood(
        "likelihood", collate(sentences(3, seed=9)), per="token"
    )
    one, other = (culpa.attribute(r, problem, [behaviour]) for r in (run, recorded))
    assert torch.equal(torch.as_tensor(one.steps), torch.as_tensor(other.steps))
    assert same(final, culpa.replay(run, problem).state)
    without = [culpa.replay(r, problem, without=[4]).state for r in (run, recorded)]
    assert same(*without)
    assert not same(final, without[0])


def test_a_changed_checkpoint_is_told_with_its_segment(output: Path, tmp_path: Path) -> None:
    file = output / "checkpoint-4" / "model.safetensors"
    tensors, name = load_file(file), "model.layers.1.mlp.up_proj.weight"
    moved = tensors[name] - load_file(output / "checkpoint-2" / "model.safetensors")[name]
    tensors[name] += 3 * moved
    save_file(tensors, file)
    with pytest.raises(NotReproducibleError, match=r"checkpoint-4.*updates 2 to 3.*up_proj"):
        from_trainer_output(output, job(output), path=tmp_path / "refused")
    kept = culpa.open_run(tmp_path / "refused")
    assert kept.manifest.status == "interrupted"
    assert kept.num_steps >= 2
    with pytest.warns(Drifted, match=r"^((?!checkpoint-[26]:).)*checkpoint-4: weights off"):
        run = from_trainer_output(
            output, job(output), path=tmp_path / "run", tolerance=float("inf")
        )
    checks = checks_of(run)
    assert [c.bitwise for c in checks] == [True, False, True]
    assert checks[1].differing == ("model",)
    assert checks[1].worst_tensor == name
    before = load_file(output / "checkpoint-2" / "model.safetensors")
    off = (3 * moved).double().norm()
    whole = sum((tensors[n] - before[n]).double().square().sum() for n in tensors) ** 0.5
    assert checks[1].drift == pytest.approx(float(off / whole), rel=1e-4)


def test_drift_within_the_tolerance_is_accepted_and_stated(output: Path) -> None:
    file = output / "checkpoint-6" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 1e-6
    save_file(tensors, file)
    with pytest.raises(NotReproducibleError, match="tolerance 0"):
        from_trainer_output(output, job(output), tolerance=0.0)
    shutil.rmtree(output / "culpa")
    with pytest.warns(Drifted, match=r"checkpoint-6: weights off by"):
        run = from_trainer_output(output, job(output))
    assert run.path == output / "culpa"
    assert 0 < checks_of(run)[2].drift < 0.01
    assert checks_of(run)[2].worst_difference == pytest.approx(1e-6, rel=0.2)


def test_one_stage_or_stages_of_ones_own(output: Path, tmp_path: Path) -> None:
    named = {"warm": 3, "rest": 6}
    run = from_trainer_output(output, job(output), path=tmp_path / "own", segments=named)
    assert [(s.name, s.start, s.stop) for s in run.stages] == [("warm", 0, 3), ("rest", 3, 6)]
    run = from_trainer_output(output, job(output), path=tmp_path / "one", stage="sft", stop=2)
    assert [(s.name, len(s)) for s in run.stages] == [("sft", 2)]
    assert [c.bitwise for c in checks_of(run)] == [True]


@pytest.mark.parametrize("start", [2, 4])
def test_from_a_checkpoint_on(
    output: Path, finished: tuple[Path, dict[str, Tensor]], tmp_path: Path, start: int
) -> None:
    run = from_trainer_output(output, job(output), path=tmp_path / "run", start=start)
    assert run.num_steps == 6 - start
    assert all(c.bitwise for c in checks_of(run))
    assert same(finished[1], culpa.replay(run, problem_of(job(tmp_path / "x"))).state)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"learning_rate": 2e-3}, "initial_lr is 0.001 there and 0.002 here"),
        ({"weight_decay": 0.0}, "weight_decay is 0.1 there and 0.0 here"),
        ({"per_device_train_batch_size": 3}, "train_batch_size is 2 there and 3 here"),
        ({"num_train_epochs": 3}, "max_steps is 6 there and 9 here"),
        ({"optim": "sgd"}, "betas is"),
    ],
)
def test_another_setting_is_told_before_it_costs(
    output: Path, tmp_path: Path, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(NotReproducibleError, match=match):
        from_trainer_output(output, job(output, **options), path=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_more_data_and_more_accumulation_in_as_many_updates(output: Path, tmp_path: Path) -> None:
    other = job(output, gradient_accumulation_steps=4)
    other.train_dataset = sentences(18)
    with pytest.raises(NotReproducibleError, match=r"after 1 updates the epoch was 0\.333"):
        from_trainer_output(output, other, path=tmp_path / "run")


@pytest.mark.parametrize("what", ["seed", "data", "model", "schedule", "drawn"])
def test_another_training_is_told_at_the_first_checkpoint(
    output: Path, tmp_path: Path, what: str
) -> None:
    options: dict[str, Any] = {
        "seed": {"seed": 2},
        "schedule": {"lr_scheduler_type": "linear"},
    }.get(what, {})
    other = job(output, **options)
    if what == "data":
        other.train_dataset = sentences(12, seed=1)
    if what == "model":
        with torch.no_grad():
            other.model.model.embed_tokens.weight[3] += 0.01
    if what == "drawn":
        torch.rand(3)
    expected = {
        "drawn": "exactly where the script called trainer.train",
        "schedule": "after 1 updates the loss was|learning_rate was",
    }.get(what, "after 1 updates the loss was")
    with pytest.raises(NotReproducibleError, match=rf"checkpoint-2.*({expected})"):
        from_trainer_output(output, other, path=tmp_path / "run")


def test_what_cannot_be_read_or_is_not_there(output: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str, folder: Path = output, **options: Any) -> None:
        with pytest.raises(error, match=match):
            from_trainer_output(folder, job(output), path=tmp_path / "run", **options)
        assert not (tmp_path / "run").exists()

    refused(StoreError, "no folder", tmp_path / "nowhere")
    refused(StoreError, "give the folder above", output / "checkpoint-2")
    refused(OptionError, r"no checkpoint-3.*there are 2, 4, 6", start=3)
    refused(OptionError, "must follow each other", start=4, stop=2)
    refused(OptionError, "must end one after another", segments={"a": 5})
    refused(OptionError, "a stage must end there", segments={"a": 3, "b": 6}, resumed=[2])
    done = job(output)
    done.state.global_step = 6
    with pytest.raises(OptionError, match="made 6 updates already"):
        from_trainer_output(output, done, path=tmp_path / "run")
    one = output / "checkpoint-2"
    torch.save({"state": {}, "param_groups": [], "evil": Masking()}, one / "optimizer.pt")
    refused(StoreError, r"optimizer\.pt cannot be opened.*executed")
    (one / "optimizer.pt").write_bytes(b"nonsense")
    refused(StoreError, r"optimizer\.pt cannot be opened")
    (one / "model.safetensors").rename(one / "pytorch_model.bin")
    refused(UnsupportedError, r"pytorch_model\.bin.*weights_only=True")
    (one / "rng_state_1.pth").write_bytes(b"")
    refused(UnsupportedError, "several processes")
    (one / "rng_state_1.pth").unlink()
    facts = json.loads((one / "trainer_state.json").read_text())
    (one / "trainer_state.json").write_text(json.dumps(facts | {"global_step": 3}))
    refused(StoreError, "after 3 updates, not 2")
    (one / "trainer_state.json").write_text("{")
    refused(StoreError, r"trainer_state\.json cannot be read")


def test_the_trainer_is_left_as_it_was(output: Path, tmp_path: Path) -> None:
    again = job(output, report_to=["tensorboard"], save_total_limit=1, load_best_model_at_end=False)
    callbacks = [type(c).__name__ for c in again.callback_handler.callbacks]
    before = contents(output)
    from_trainer_output(output, again, path=tmp_path / "run", stop=2)
    assert contents(output) == before
    assert sorted(type(c).__name__ for c in again.callback_handler.callbacks) == sorted(callbacks)
    assert "_save_checkpoint" not in vars(again)
    assert again.args.save_total_limit == 1
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith("culpa-")] == []
