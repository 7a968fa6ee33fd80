"""TRL's trainers are ``transformers.Trainer``s: supervised fine-tuning and preferences, recorded
and replayed bit for bit, their updates scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

trl = pytest.importorskip("trl", reason="trl is not installed: pip install culpa[trl]")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

import culpa
from culpa.integrations.trainer_checks import checks_of
from culpa.integrations.trainer_output import from_trainer_output
from culpa.integrations.transformers import problem_of, record_trainer
from integrations.by_hand import retrained, spied
from integrations.llama import VOCABULARY, collate, llama, sentences
from oracles.compare import assert_close

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def tokenizer() -> Any:
    """Words w1, w2, ... are tokens 1, 2, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}
    model = Tokenizer(models.WordLevel(words, unk_token="w1"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="w1")


def words(seed: int) -> list[str]:
    return [" ".join(f"w{i}" for i in row["input_ids"]) for row in sentences(8, seed)]


def trainer(kind: str, folder: Path, dropout: float = 0.1, **options: Any) -> Any:
    """8 sentences, 2 an update, adapters with dropout."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "seed": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "max_length": 16,
    } | options
    adapters = peft.LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], lora_dropout=dropout, task_type="CAUSAL_LM"
    )
    if kind == "sft":
        rows, config, chosen = {"text": words(0)}, trl.SFTConfig, trl.SFTTrainer
    else:
        rows = {"prompt": ["w2 w3"] * 8, "chosen": words(1), "rejected": words(2)}
        rows |= {side: [f" {text}" for text in rows[side]] for side in ("chosen", "rejected")}
        config, chosen = trl.DPOConfig, trl.DPOTrainer
    torch.manual_seed(0)
    return chosen(
        model=llama(),
        args=config(str(folder), **settings),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tokenizer(),
        peft_config=adapters,
    )


def adapters_of(job: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in job.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_trainer_of_trl(tmp_path: Path, kind: str) -> None:
    plain = trainer(kind, tmp_path / "plain")
    before = adapters_of(plain)
    plain.train()
    job = trainer(kind, tmp_path / "job")
    with record_trainer(job, tmp_path / "run", stage=kind) as recording:
        job.train()
    assert recording.num_steps == 4
    wanted, found = adapters_of(plain), adapters_of(job)
    assert any(not torch.equal(before[n], v) for n, v in wanted.items())
    assert all(torch.equal(v, found[n]) for n, v in wanted.items())
    run, problem = culpa.open_run(tmp_path / "run"), problem_of(trainer(kind, tmp_path / "fresh"))
    again = culpa.replay(run, problem)
    assert all(torch.equal(v, again.state[n]) for n, v in wanted.items())
    batch = collate(sentences(3, seed=9))
    behaviour = culpa.behaviours.sequence_log_likelihood("likelihood", batch, per="token")
    scores = culpa.attribute(run, problem, [behaviour]).steps[:, 0]
    truths = [culpa.replay(run, problem, without=[k]).effect(behaviour).mean() for k in range(4)]
    assert_close(scores, torch.stack(truths), 0.4)  # first order, of adapters that start at zero


def test_supervised_fine_tuning_that_is_over(tmp_path: Path) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    first = trainer("sft", tmp_path / "output", **saving)
    first.train()
    again = trainer("sft", tmp_path / "output", **saving)
    run = from_trainer_output(tmp_path / "output", again, path=tmp_path / "run")
    assert [check.bitwise for check in checks_of(run)] == [True, True]
    assert checks_of(run)[0].compared == ("adapters", "optimizer", "scheduler")
    state = culpa.replay(run, problem_of(trainer("sft", tmp_path / "fresh"))).state
    assert all(torch.equal(v, state[n]) for n, v in adapters_of(first).items())


def test_supervised_fine_tuning_without_an_update_against_a_loop_by_hand(tmp_path: Path) -> None:
    options: dict[str, Any] = {"weight_decay": 0.1, "max_grad_norm": 0.5}
    options |= {"gradient_accumulation_steps": 2, "num_train_epochs": 2}
    seen = spied(trainer("sft", tmp_path / "spied", 0.0, **options))
    assert len(seen.updates) == 4
    job = trainer("sft", tmp_path / "job", 0.0, **options)
    with record_trainer(job, tmp_path / "run", stage="sft"):
        job.train()
    run, problem = culpa.open_run(tmp_path / "run"), problem_of(job)
    full = adapters_of(job)
    for without in ([], [0], [2], [3]):
        fresh = trainer("sft", tmp_path / "fresh", 0.0, **options).model
        truth = retrained(fresh, seen, without)
        found = culpa.replay(run, problem, without=without).state
        for name, value in truth.items():
            assert torch.allclose(found[name], value, atol=2e-5), (without, name)
        assert without == [] or any(not torch.allclose(full[n], truth[n], atol=2e-4) for n in full)
