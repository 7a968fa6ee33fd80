"""A Llama fine-tuned on comments, then on preferences at a rate that ruins it.

The preference loss is that of DPO (Rafailov et al., 2305.18290, eq. 7), in a plain loop, the log-
probabilities of the reference computed beforehand; its rate warms up to one that is far too high
and decays. Which stage, and which update, made the model forget how comments go on? Needs
``toxicity.parquet`` (with columns ``comment`` and ``toxic``) in the folder ``CULPA_DATA``,
transformers and polars, and the folder of a causal language model: ``stories260K`` in
``CULPA_MODELS`` unless another is named.

    python examples/llama_dpo.py [--model FOLDER] [--out docs/examples/llama_dpo.md]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import polars as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import culpa

ROWS, JUDGED, BETA = 8, 40, 0.1
TUNING = [2e-3] * 8
PREFERRING = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-3, 1e-3, 3e-4]
"""The rates of all updates: of the first stage, and of the second, which goes up far too high."""
Batch = dict[str, Any]
Job = tuple[str, Callable[[nn.Module, Any], Tensor], list[Batch], list[float]]
"""A stage: its name, loss, batches and rates."""


def answers(toxic: int) -> list[tuple[str, str]]:
    """Of all comments of one kind that are long enough: the first words, and the next twelve."""
    data = pl.read_parquet(Path(os.environ["CULPA_DATA"]) / "toxicity.parquet")
    words = [text.split() for text in data.filter(pl.col("toxic") == toxic)["comment"]]
    return [(" ".join(w[:3]), " " + " ".join(w[3:15])) for w in words if len(w) > 6]


def encoded(tokenizer: Any, pairs: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Token ids, masks, and labels of what follows the first words."""
    prompts, ends = zip(*pairs, strict=True)
    return culpa.behaviours.completions(tokenizer, prompts, ends)


def log_probabilities(model: nn.Module, rows: dict[str, Tensor]) -> Tensor:
    """Of the labelled tokens of each row, summed: [n]."""
    logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    labels = rows["labels"][:, 1:]
    found = torch.log_softmax(logits[:, :-1], -1).gather(2, labels.clamp(min=0)[..., None])
    return (found[..., 0] * (labels != -100)).sum(1)


def tuning(model: nn.Module, batch: Batch) -> Tensor:
    """Minus the log-likelihood of the comments, a token."""
    return -log_probabilities(model, batch).sum() / (batch["labels"][:, 1:] != -100).sum()


def preferring(model: nn.Module, batch: Batch) -> Tensor:
    """DPO's loss."""
    chosen, rejected = (log_probabilities(model, batch[side]) for side in ("chosen", "rejected"))
    margin = (chosen - batch["chosen before"]) - (rejected - batch["rejected before"])
    return -logsigmoid(BETA * margin).mean()


def pretrained(folder: Path) -> nn.Module:
    """The model, the same every time."""
    return AutoModelForCausalLM.from_pretrained(folder).train()


def jobs_of(folder: Path) -> list[Job]:
    """Both stages. The reference of the second is what the first led to, and stays that."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    civil, toxic = (answers(kind)[JUDGED:] for kind in (0, 1))
    batches = [encoded(tokenizer, civil[i * ROWS : (i + 1) * ROWS]) for i in range(len(TUNING))]
    first: Job = ("sft", tuning, batches, TUNING)
    reference, pairs = train(folder, [first]), list[Batch]()
    for i in range(len(PREFERRING)):
        rows = slice((len(TUNING) + i) * ROWS, (len(TUNING) + i + 1) * ROWS)
        prompts = [prompt for prompt, _ in civil[rows]]
        bad = [end for _, end in toxic[i * ROWS : (i + 1) * ROWS]]
        pair: Batch = {
            "chosen": encoded(tokenizer, civil[rows]),
            "rejected": encoded(tokenizer, list(zip(prompts, bad, strict=True))),
        }
        with torch.no_grad():
            before = {f"{s} before": log_probabilities(reference, pair[s]) for s in pair}
        pairs.append(pair | before)
    return [first, ("dpo", preferring, pairs, PREFERRING)]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Each stage has its own."""
    return torch.optim.AdamW(model.parameters(), weight_decay=0.0)


def train(folder: Path, jobs: list[Job], without: Collection[int] = ()) -> nn.Module:
    """Without culpa, and without some updates."""
    model, k = pretrained(folder), 0
    for _, loss, batches, rates in jobs:
        optimizer = optimizer_of(model)
        for batch, rate in zip(batches, rates, strict=True):
            if k not in without:
                optimizer.param_groups[0]["lr"] = rate
                optimizer.zero_grad()
                loss(model, batch).backward()
                optimizer.step()
            k += 1
    return model


def recorded(folder: Path, jobs: list[Job], path: Path) -> nn.Module:
    """The same loop, recorded."""
    model = pretrained(folder)
    optimizer = optimizer_of(model)
    with culpa.record(path, problem_of(model, jobs), optimizer, overwrite=True) as recorder:
        for name, loss, batches, rates in jobs:
            optimizer = optimizer if name == jobs[0][0] else optimizer_of(model)
            with recorder.stage(name, optimizer=optimizer):
                for batch, rate in zip(recorder.batches(batches), rates, strict=True):
                    optimizer.param_groups[0]["lr"] = rate
                    optimizer.zero_grad()
                    loss(model, batch).backward()
                    optimizer.step()
    return model


def problem_of(model: nn.Module, jobs: list[Job]) -> culpa.Problem:
    """A loss for each stage."""
    return culpa.Problem.by_stage({name: culpa.Problem(model, loss) for name, loss, _, _ in jobs})


def seconds(work: Callable[[], object]) -> float:
    """Of the processor, by this thread."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def study(folder: Path, path: Path) -> str:
    """The page."""
    jobs = jobs_of(folder)
    trained, live = train(folder, jobs), recorded(folder, jobs, path)
    same = all(map(torch.equal, trained.state_dict().values(), live.state_dict().values()))
    pairs = [
        (seconds(lambda: train(folder, jobs)), seconds(lambda: recorded(folder, jobs, path)))
        for _ in range(3)
    ]
    ratio = min(b for _, b in pairs) / min(a for a, _ in pairs)

    run, problem = culpa.open_run(path), problem_of(pretrained(folder), jobs)
    again = culpa.replay(run, problem).state
    replayed = all(torch.equal(again[n], p) for n, p in trained.named_parameters())
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    batch = encoded(tokenizer, answers(0)[:JUDGED])
    behaviour = culpa.behaviours.sequence_log_likelihood("civil comments", batch, per="token")

    def value(without: Collection[int] = ()) -> Tensor:
        return behaviour.values(train(folder, jobs, without).eval())

    whole, tuned = value(), value(run.stage("dpo").updates)
    before = behaviour.values(pretrained(folder).eval()).mean()
    record = culpa.audit(run, problem, [behaviour], budget=2.0).record
    lines: list[str] = []
    embedded = culpa.embed(run, problem, propagator=culpa.Exact(at="gauss")).effect(behaviour)
    for at, stage in enumerate(record.stages):
        truth = whole - value(run.stage(stage.name).updates)
        proved = stage.replayed[0]
        agreed = culpa.agreement(embedded[at], truth).pearson
        cells = (
            f"{truth.mean():+.4f}",
            "not replayed" if proved is None else f"{proved:+.4f}",
            f"{embedded[at].mean():+.4f}",
            f"{agreed:.3f}",
        )
        lines.append(f"| {stage.name} | {' | '.join(cells)} |")
    blamed = min(record.stages, key=lambda stage: stage.effects[0])
    within = run.stage(blamed.name).updates
    found = culpa.find_updates(run, problem, [behaviour], within=within, budget=3.0)
    named = found.culprits[0].start if found.culprits else -1
    truths = {k: float((whole - value([k])).mean()) for k in within}
    worst = sorted(truths, key=lambda k: truths[k])
    scores = [record.updates.scores[k][0] for k in within] if record.updates else []
    by_score = within[scores.index(min(scores))] if scores else -1
    rows = [
        f"| {k} | {PREFERRING[k - within.start]:g} | {truths[k]:+.3f} |"
        for k in (within if blamed.name == "dpo" else ())
    ]
    yes = {True: "yes", False: "NO"}
    size = sum(p.numel() for p in trained.parameters())
    return "\n".join(
        [
            "# A Llama fine-tuned, then ruined by preferences",
            "",
            f"Made by `python examples/llama_dpo.py`: {folder.name} ({size} parameters),"
            f" {len(TUNING)} updates of {ROWS} civil comments each, then {len(PREFERRING)} of DPO"
            f" on {ROWS} pairs each (civil against toxic continuations, beta {BETA}; AdamW whose"
            f" rate warms up to {max(PREFERRING)} and decays). torch {torch.__version__},"
            f" {torch.get_num_threads()} thread.",
            "",
            f"* Recording left training as it was, bit for bit: {yes[same]}.",
            f"* Replay gives the same bits: {yes[replayed]}.",
            f"* Recording took {ratio:.2f} times the training thread's processor time (smaller of"
            " three each, in turns, on a machine that others used too; loading the model included;"
            f" every stage's first update, one of {len(TUNING)} and {len(PREFERRING)}, is executed"
            " a second time).",
            "",
            f"The behaviour: log-likelihood (nats a token) of the next words of {JUDGED} held-out"
            f" civil comments. {before:.3f} before training, {tuned.mean():.3f} after fine-tuning"
            f" alone, {whole.mean():.3f} at the end. The truth is the same loop without the stage"
            " or the update, the reference's log-probabilities as they were.",
            "",
            "| stage | true effect | audit's replay | `embed` (two Gauss points) | correlation |",
            "|---|---|---|---|---|",
            *lines,
            "",
            f"* The audit blames: **{blamed.name}**.",
            f"* Inside of it `culpa.find_updates` names update **{named}**, at"
            f" {found.replays} replays to the end of training; it is number"
            f" {worst.index(named) + 1 if named in worst else 0} of {len(within)} by its true"
            f" effect. The worst by its first-order score is {by_score}, number"
            f" {worst.index(by_score) + 1 if by_score in worst else 0}.",
            "",
            "The truth, update by update of that stage (each left out alone):",
            "",
            "| update | rate | true effect |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> None:
    """Print the page, or write it."""
    arguments = argparse.ArgumentParser(description=__doc__)
    known = Path(os.environ.get("CULPA_MODELS", "")) / "stories260K"
    arguments.add_argument("--model", type=Path, default=known)
    arguments.add_argument("--out", type=Path)
    chosen = arguments.parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        page = study(chosen.model, Path(folder) / "run")
    if chosen.out:
        chosen.out.write_text(page, encoding="utf-8")
    else:
        print(page)


if __name__ == "__main__":
    main()
