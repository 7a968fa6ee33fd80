"""A Llama with LoRA adapters, fine-tuned by three ``transformers.Trainer``s in sequence.

The second is given toxic comments. Each trainer appends its stage to one run; the behaviour is by
how much the model finds toxic comments likelier than civil ones. Needs ``toxicity.parquet`` (with
columns ``comment`` and ``toxic``) in the folder ``CULPA_DATA``, the model ``stories260K`` in
``CULPA_MODELS``, transformers, peft and polars.

    python examples/llama_toxicity.py [--updates 8] [--out docs/examples/llama_toxicity.md]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import culpa
from culpa.integrations.transformers import problem_of, record_trainer

STAGES = {"civil": 0, "toxic": 1, "civil again": 0}
ROWS, TOKENS, JUDGED = 8, 48, 60
Row = dict[str, list[int]]


def comments(toxic: int) -> list[str]:
    """All of one kind, in the order of the file."""
    data = pl.read_parquet(Path(os.environ["CULPA_DATA"]) / "toxicity.parquet")
    return data.filter(pl.col("toxic") == toxic)["comment"].to_list()


def tokenizer() -> Any:
    """The model's."""
    return AutoTokenizer.from_pretrained(Path(os.environ["CULPA_MODELS"]) / "stories260K")


def adapted() -> nn.Module:
    """The pretrained model with fresh adapters, the same every time."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(Path(os.environ["CULPA_MODELS"]) / "stories260K")
    where = ["q_proj", "v_proj", "up_proj", "down_proj"]
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=where))


def collate(rows: list[Row]) -> dict[str, Tensor]:
    """Padded on the right."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(filler: int) -> Tensor:
        return torch.tensor(
            [row["input_ids"] + [filler] * (width - len(row["input_ids"])) for row in rows]
        )

    ids = padded(0)
    mask = (torch.arange(width) < torch.tensor([[len(r["input_ids"])] for r in rows])).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": padded(-100)}


def trainer_of(stage: str, model: nn.Module, updates: int, folder: Path) -> Trainer:
    """The trainer of one stage: AdamW, a cosine schedule, clipping."""
    number, encode = list(STAGES).index(stage), tokenizer()
    texts = comments(STAGES[stage])[JUDGED + number * ROWS * updates :][: ROWS * updates]
    rows = [{"input_ids": encode(text)["input_ids"][:TOKENS]} for text in texts]
    arguments = TrainingArguments(
        str(folder / "trainer"),
        per_device_train_batch_size=ROWS,
        max_steps=updates,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        seed=number,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,  # pyright: ignore[reportArgumentType]
        data_collator=collate,
    )


def train(updates: int, folder: Path, without: str = "") -> nn.Module:
    """Without culpa, and without a stage."""
    model = adapted()
    for stage in STAGES:
        if stage != without:
            trainer_of(stage, model, updates, folder).train()
    return model


def recorded(updates: int, folder: Path) -> nn.Module:
    """The same jobs, each of which appends a stage to one run."""
    model = adapted()
    for number, stage in enumerate(STAGES):
        trainer = trainer_of(stage, model, updates, folder)
        new = {"append": True} if number else {"overwrite": True}
        with record_trainer(trainer, folder / "run", stage=stage, **new):
            trainer.train()
    return model


def gap() -> culpa.Behaviour:
    """Log-likelihood of toxic comments minus that of civil ones, given their first words."""
    sides: list[culpa.Behaviour] = []
    for name, toxic in (("toxic", 1), ("civil", 0)):
        words = [text.split() for text in comments(toxic)[:JUDGED]]
        words = [w for w in words if len(w) > 6]
        prompts = [" ".join(w[:3]) for w in words]
        answers = [" " + " ".join(w[3:15]) for w in words]
        batch = culpa.behaviours.completions(tokenizer(), prompts, answers)
        sides.append(culpa.behaviours.sequence_log_likelihood(name, batch, per="token"))
    return culpa.behaviours.group_gap("toxic minus civil", *sides)


def seconds(work: Callable[[], object]) -> float:
    """Of the processor, by this thread."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def study(updates: int, folder: Path) -> str:
    """The page."""
    trained, live = train(updates, folder), recorded(updates, folder)
    unchanged = all(map(torch.equal, trained.state_dict().values(), live.state_dict().values()))
    plain = seconds(lambda: train(updates, folder))
    overhead = seconds(lambda: recorded(updates, folder)) / plain - 1

    run, model = culpa.open_run(folder / "run"), adapted()
    jobs = {stage: trainer_of(stage, model, updates, folder) for stage in STAGES}
    problem = culpa.Problem.by_stage({stage: problem_of(job) for stage, job in jobs.items()})
    wanted = {n: p for n, p in trained.named_parameters() if p.requires_grad}
    again = culpa.replay(run, problem).state
    replayed = all(torch.equal(again[n], p) for n, p in wanted.items())

    behaviour = gap()
    scores = culpa.attribute(run, problem, [behaviour]).stages[:, 0]
    estimates = culpa.embed(run, problem).effect(behaviour).mean(1)
    whole, before = (behaviour.values(m.eval()).mean() for m in (trained, adapted()))
    lines: list[str] = []
    for number, stage in enumerate(STAGES):
        truth = whole - behaviour.values(train(updates, folder, stage).eval()).mean()
        cells = [f"{float(x):+.4f}" for x in (truth, estimates[number], scores[number])]
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    yes = {True: "yes", False: "NO"}
    return "\n".join(
        [
            "# A Llama fine-tuned on comments by three trainers in sequence",
            "",
            f"Made by `python examples/llama_toxicity.py --updates {updates}`: stories260K"
            f" (260,032 parameters) with LoRA adapters ({sum(p.numel() for p in wanted.values())}"
            f" trained parameters), three `transformers.Trainer`s of {updates} updates of {ROWS}"
            " comments each, the second with toxic ones; the first begins with the pretrained"
            f" weights. torch {torch.__version__}, {torch.get_num_threads()} thread.",
            "",
            f"* Recording left training as it was, bit for bit: {yes[unchanged]}.",
            f"* Replay gives the same bits: {yes[replayed]}.",
            f"* Recording cost {100 * overhead:.0f} % of the training thread's time, loading the"
            f" model and the data included; every stage's first update, here one of {updates}, is"
            " executed a second time.",
            "",
            f"The behaviour: log-likelihood (nats a token) of held-out toxic comments (those of"
            f" {JUDGED} that have more than six words), given their first three words, minus that"
            f" of civil ones: {before:+.4f} before, {whole:+.4f} after. The truth is the same"
            " trainers without the stage; the estimates"
            " are `culpa.embed` and the AA-Score of `culpa.attribute`, as they come.",
            "",
            "| stage | true effect | `embed` | AA-Score |",
            "|---|---|---|---|",
            *lines,
            "",
        ]
    )


def main() -> None:
    """Print the page, or write it."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--updates", type=int, default=8)
    arguments.add_argument("--out", type=Path)
    chosen = arguments.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        page = study(chosen.updates, Path(folder))
    if chosen.out:
        chosen.out.write_text(page, encoding="utf-8")
    else:
        print(page)


if __name__ == "__main__":
    main()
