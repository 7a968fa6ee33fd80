"""Behaviours of causal language models: what they make of a completion, given its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from culpa.behaviour import Behaviour
from culpa.behaviours.outputs import predict
from culpa.errors import BehaviourError, OptionError

IGNORED = -100
"""The label of tokens that are not judged, as in the loss of every library."""
Completions = dict[str, Tensor]
"""``input_ids``, ``attention_mask`` and ``labels``, int64 ``[n, T]``; ``labels`` is -100 outside of
the completions."""


def completions(
    tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], *, device: str = "cpu"
) -> Completions:
    """Tokenize prompts with their completions, padded on the right; only the latter are judged.

    Prompt and completion are tokenized apart and joined, so that no token belongs to both. The
    tokenizer's own special tokens stand before the prompt, and its end-of-sequence token, if it
    has one, after the completion.

    Args:
        tokenizer: of Hugging Face's kind: ``tokenizer(text)["input_ids"]``.
        prompts, answers: n texts each.
        device: where the tensors shall lie.
    """
    if len(prompts) != len(answers) or not prompts:
        raise OptionError(
            f"completions needs one answer a prompt, got {len(prompts)} and {len(answers)}."
        )
    end = getattr(tokenizer, "eos_token_id", None)
    rows: list[tuple[list[int], list[int]]] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        before = list(tokenizer(prompt)["input_ids"])
        if before and before[-1] == end:  # some tokenizers close every text
            before.pop()
        after = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
        if not after:
            raise OptionError(f"the completion {answer!r} has no tokens; nothing can be judged.")
        rows.append((before, after if end is None else [*after, end]))
    width = max(len(before) + len(after) for before, after in rows)
    shape = (len(rows), width)
    found = {
        "input_ids": torch.zeros(shape, dtype=torch.int64),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORED, dtype=torch.int64),
    }
    for at, (before, after) in enumerate(rows):
        stop = len(before) + len(after)
        found["input_ids"][at, :stop] = torch.tensor([*before, *after])
        found["attention_mask"][at, :stop] = 1
        found["labels"][at, len(before) : stop] = torch.tensor(after)
    return {name: value.to(device) for name, value in found.items()}


def sequence_log_likelihood(name: str, batch: Completions, *, per: str = "sequence") -> Behaviour:
    """Log-likelihood of the labelled tokens of each sequence, in nats.

    Args:
        name: how tables and reports call it.
        batch: what ``completions`` returns. The label of position t is predicted from the tokens
            before it; labels of -100, and a label at the first position, are not judged.
        per: what a test point is. ``"sequence"``: a sequence, the sum over its labelled tokens.
            ``"token"``: a sequence, the mean over them. ``"each token"``: every labelled token.
    """
    if per not in ("sequence", "token", "each token"):
        raise OptionError(
            f"sequence_log_likelihood(per=...) is 'sequence', 'token' or 'each token', got {per!r}."
        )
    unit = "nats" if per == "sequence" else "nats/token"
    return Behaviour(name, partial(_sequence_log_likelihood, per=per), batch, unit=unit)


def preference_margin(name: str, chosen: Completions, rejected: Completions) -> Behaviour:
    """Log-likelihood of the chosen minus that of the rejected completion, in nats, a pair a number.

    Args:
        name: how tables and reports call it.
        chosen, rejected: what ``completions`` returns for the same prompts, n rows each.
    """
    if len(chosen["labels"]) != len(rejected["labels"]):
        raise OptionError(
            "preference_margin needs as many chosen as rejected completions, got"
            f" {len(chosen['labels'])} and {len(rejected['labels'])}."
        )
    return Behaviour(name, _preference_margin, (chosen, rejected), unit="nats")


def _preference_margin(model: nn.Module, batch: tuple[Completions, Completions]) -> Tensor:
    chosen, rejected = batch
    return _sequence_log_likelihood(model, chosen, "sequence") - _sequence_log_likelihood(
        model, rejected, "sequence"
    )


def _sequence_log_likelihood(model: nn.Module, batch: Completions, per: str) -> Tensor:
    missing = {"input_ids", "labels"} - batch.keys()
    if missing:
        raise BehaviourError(
            f"sequence_log_likelihood needs a batch with input_ids and labels; {sorted(missing)}"
            " are missing. culpa.behaviours.completions makes such a batch."
        )
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = predict(model, inputs, "sequence_log_likelihood")
    labels = batch["labels"][:, 1:]
    if logits.shape[:2] != batch["labels"].shape or logits.ndim != 3:
        raise BehaviourError(
            "sequence_log_likelihood needs logits [n, T, vocabulary] for labels [n, T], got"
            f" {tuple(logits.shape)} and {tuple(batch['labels'].shape)}."
        )
    judged = labels != IGNORED
    if not bool(judged.any(1).all()):
        raise BehaviourError(
            "sequence_log_likelihood: a sequence has no labelled token after its first; nothing of"
            " it can be judged."
        )
    logits = logits[:, :-1]
    half = logits.dtype in (torch.float16, torch.bfloat16)
    scores = torch.log_softmax(logits.float() if half else logits, dim=-1)
    found = scores.gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    if per == "each token":
        return found[judged]
    total = (found * judged).sum(1)
    return total if per == "sequence" else total / judged.sum(1)
