"""A tiny Llama with random weights, sentences of random tokens, and a trainer for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

VOCABULARY, PAD = 24, 0


def llama(dropout: float = 0.0) -> LlamaForCausalLM:
    """Two layers of width 16, seeded; ``dropout`` of the attention."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        pad_token_id=PAD,
        tie_word_embeddings=True,
        attention_dropout=dropout,
    )
    return LlamaForCausalLM(config)


def sentences(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Of 4 to 9 tokens, the first two of them not judged."""
    draw = torch.Generator().manual_seed(seed)
    rows: list[dict[str, list[int]]] = []
    for _ in range(count):
        length = int(torch.randint(4, 10, (1,), generator=draw))
        ids = torch.randint(1, VOCABULARY, (length,), generator=draw).tolist()
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return rows


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Padded on the right."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, filler: int) -> torch.Tensor:
        return torch.tensor([row[key] + [filler] * (width - len(row[key])) for row in rows])

    ids = padded("input_ids", PAD)
    return {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "labels": padded("labels", -100),
    }


def trainer(folder: Path, model: nn.Module | None = None, **options: Any) -> Trainer:
    """12 sentences, batches of 2, two of them an update, two epochs: 6 updates."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "max_grad_norm": 0.5,
        "weight_decay": 0.1,
        "seed": 1,
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    } | options
    return Trainer(
        model=model if model is not None else llama(),
        args=TrainingArguments(str(folder), **settings),
        train_dataset=sentences(12),  # pyright: ignore[reportArgumentType]
        eval_dataset=sentences(4, seed=5),  # pyright: ignore[reportArgumentType]
        data_collator=collate,
    )
