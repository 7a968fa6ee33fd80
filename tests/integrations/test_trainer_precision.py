"""Mixed precision and resumed training in a ``transformers.Trainer``: replayed bit for bit, and an
update left out against a loop written by hand."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

pytest.importorskip("transformers")
# transformers, peft and their dependencies deprecate each other's functions.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

from accelerate.state import AcceleratorState

import culpa
from culpa.integrations.trainer_checks import checks_of
from culpa.integrations.trainer_output import from_trainer_output
from culpa.integrations.transformers import problem_of, record_trainer
from integrations.by_hand import retrained, spied
from integrations.llama import llama, trainer


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[n]) for n, v in one.items())


def off(found: dict[str, Tensor], truth: dict[str, Tensor], full: dict[str, Tensor]) -> float:
    """How far a state is from the truth, relative to how far the truth is from the full run."""
    error = sum(float((found[n] - v).double().square().sum()) for n, v in truth.items())
    moved = sum(float((full[n] - v).double().square().sum()) for n, v in truth.items())
    return (error / moved) ** 0.5


@pytest.fixture
def half() -> Generator[Any]:
    """Trainers as ``fp16=True`` makes them, which accelerate does on accelerators only.

    Autocast to float16 and a ``GradScaler`` that begins so high that updates are skipped.
    """

    def job(folder: Path, **options: Any) -> Any:
        made = trainer(folder, llama(), **options)
        made.accelerator.state._mixed_precision = "fp16"
        made.accelerator.native_amp = True
        made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
        return made

    yield job
    AcceleratorState._reset_state(reset_partial_state=True)


def test_float16_with_a_scaler_and_skipped_updates(tmp_path: Path, half: Any) -> None:
    plain = half(tmp_path / "plain")
    seen = spied(plain)
    assert plain.state.global_step == 6
    assert 2 <= len(seen.updates) < 6  # some were skipped
    job = half(tmp_path / "job")
    with record_trainer(job, tmp_path / "run", stage="sft") as recording:
        job.train()
    assert recording.num_steps == len(seen.updates)
    assert same(weights(plain.model), weights(job.model))
    run, problem = culpa.open_run(tmp_path / "run"), problem_of(half(tmp_path / "fresh"))
    again = culpa.replay(run, problem)
    full = weights(plain.model)
    assert same(full, {n: again.state[n] for n in full})
    for k in range(len(seen.updates)):
        truth = retrained(llama(), seen, [k], autocast=torch.float16)
        assert off(culpa.replay(run, problem, without=[k]).state, truth, full) < 0.05, k


def test_a_float16_training_that_is_over(tmp_path: Path, half: Any) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3}
    first = half(tmp_path / "output", **saving)
    first.train()
    run = from_trainer_output(tmp_path / "output", half(tmp_path / "output", **saving))
    assert all(check.bitwise for check in checks_of(run))
    assert checks_of(run)[0].compared == ("model", "optimizer", "scheduler", "scaler")
    final = run.final_state()
    assert same(weights(first.model), {n: final[n] for n in weights(first.model)})


def test_bfloat16(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "plain", bf16=True)
    seen = spied(plain)
    job = trainer(tmp_path / "job", bf16=True)
    with record_trainer(job, tmp_path / "run", stage="sft"):
        job.train()
    full = weights(plain.model)
    assert same(full, weights(job.model))
    run = culpa.open_run(tmp_path / "run")
    problem = problem_of(trainer(tmp_path / "fresh", bf16=True))
    for k in (1, 4):
        truth = retrained(llama(), seen, [k], autocast=torch.bfloat16)
        assert off(culpa.replay(run, problem, without=[k]).state, truth, full) < 0.1, k
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("stop", [2, 3])  # in the middle of an epoch, and between two
def test_an_update_after_a_resumption(tmp_path: Path, stop: int) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": stop}
    trainer(tmp_path / "job", **saving).train()
    checkpoint = tmp_path / "job" / f"checkpoint-{stop}"
    resumed = {"resume_from_checkpoint": str(checkpoint)}
    seen = spied(trainer(tmp_path / "job", **saving), **resumed)
    job = trainer(tmp_path / "job", **saving)
    with record_trainer(job, tmp_path / "run", stage="resumed"):
        job.train(**resumed)
    run, problem = culpa.open_run(tmp_path / "run"), problem_of(trainer(tmp_path / "fresh"))
    full = weights(job.model)
    again = culpa.replay(run, problem).state
    assert same(full, {n: again[n] for n in full})
    for k in (0, run.num_steps - 1):
        model = llama()
        model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
        state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        truth = retrained(model, seen, [k], optimizer_state=state)
        assert off(culpa.replay(run, problem, without=[k]).state, truth, full) < 0.005, k
