"""Every ready-made behaviour against its definition written out in plain Python."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import culpa
from culpa import behaviours
from culpa.errors import BehaviourError, OptionError


class Fixed(nn.Module):
    """Returns what it was given to return, whatever it is asked."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = nn.Parameter(output)

    def forward(self, *args: Any, **inputs: Any) -> Tensor:
        return self.output


class Named(Fixed):
    """As models of the transformers library answer."""

    def forward(self, *args: Any, **inputs: Any) -> Any:
        return SimpleNamespace(logits=self.output)


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = sum(math.exp(x - top) for x in row)
    return [math.exp(x - top) / total for x in row]


@st.composite
def classified(draw: st.DrawFn) -> tuple[list[list[float]], list[int]]:
    classes, count = draw(st.integers(2, 6)), draw(st.integers(1, 12))
    logit = st.floats(-8, 8, allow_nan=False)
    rows = draw(
        st.lists(
            st.lists(logit, min_size=classes, max_size=classes), min_size=count, max_size=count
        )
    )
    return rows, draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count))


def values(behaviour: culpa.Behaviour, output: Tensor, kind: type[Fixed] = Fixed) -> list[float]:
    return behaviour.values(kind(output)).tolist()


@given(classified())
@settings(max_examples=60, deadline=None)
def test_classifiers(case: tuple[list[list[float]], list[int]]) -> None:
    rows, right = case
    logits, targets = torch.tensor(rows, dtype=torch.float64), torch.tensor(right)
    batch = (None, targets)
    shares = [softmax(row) for row in rows]
    likely = [math.log(p[t]) for p, t in zip(shares, right, strict=True)]
    assert values(behaviours.log_likelihood("b", batch), logits) == pytest.approx(likely)
    others = [[x for i, x in enumerate(r) if i != t] for r, t in zip(rows, right, strict=True)]
    hard = [r[t] - max(o) for r, t, o in zip(rows, right, others, strict=True)]
    assert values(behaviours.margin("b", batch), logits) == pytest.approx(hard)
    soft = [
        r[t] - math.log(sum(math.exp(x) for x in o))
        for r, t, o in zip(rows, right, others, strict=True)
    ]
    assert values(behaviours.margin("b", batch, soft=True), logits) == pytest.approx(soft)
    # Ties go to the first, as argmax has it.
    hits = [float(r.index(max(r)) == t) for r, t in zip(rows, right, strict=True)]
    assert values(behaviours.accuracy("b", batch), logits) == hits
    sure = [max(p) - h for p, h in zip(shares, hits, strict=True)]
    found = values(behaviours.overconfidence("b", batch), logits)
    if all(sorted(r)[-1] - sorted(r)[-2] > 1e-9 for r in rows):  # softmax may reorder near ties
        assert found == pytest.approx(sure)


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_calibration_error_is_the_expected_calibration_error(bins: int) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(400, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(5, (400,), generator=generator)
    confidence, chosen = torch.softmax(logits, 1).max(1)
    right, sure = (chosen == targets).numpy(), confidence.numpy()
    error, edges = 0.0, np.linspace(0, 1, bins + 1)
    for low, high in itertools.pairwise(edges):
        inside = (sure > low) & (sure <= high)
        if inside.any():
            error += inside.mean() * abs(sure[inside].mean() - right[inside].mean())
    found = behaviours.calibration_error("ece", (None, targets), bins=bins)
    assert found.values(Fixed(logits)).mean().item() == pytest.approx(error, abs=1e-12)


def test_outputs_with_logits_and_inputs_by_name() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    batch = ({"input_ids": torch.zeros(2, 3)}, torch.tensor([0, 0]))
    assert values(behaviours.margin("b", batch), logits, Named) == [1.0, -1.0]


def test_regression_and_similarity() -> None:
    found = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    batch = (None, torch.tensor([[0.0, 4.0], [3.0, 4.0]]))
    assert values(behaviours.regression_error("b", batch), found) == [2.5, 0.5]
    assert values(behaviours.regression_error("b", batch, kind="absolute"), found) == [1.5, 0.5]
    with pytest.raises(BehaviourError, match="broadcast"):
        values(behaviours.regression_error("b", (None, torch.zeros(2))), found)

    def embed(model: nn.Module, inputs: Tensor) -> Tensor:
        return inputs * model(inputs)

    pairs = (torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
    cosine = behaviours.embedding_similarity("b", embed, pairs)
    assert values(cosine, torch.tensor([1.0, 1.0])) == pytest.approx([math.sqrt(0.5)])


def test_a_gap_is_the_difference_of_means_whatever_the_sizes() -> None:
    def likelihood(model: nn.Module, batch: Tensor) -> Tensor:
        return batch * model(batch)

    one = culpa.Behaviour("men", likelihood, torch.tensor([1.0, 2.0, 6.0]))
    other = culpa.Behaviour("women", likelihood, torch.tensor([1.0, 3.0]))
    gap = behaviours.group_gap("gap", one, other).values(Fixed(torch.tensor([2.0])))
    assert len(gap) == 5
    assert gap.mean().item() == pytest.approx(6.0 - 4.0)
    with pytest.raises(OptionError, match="one unit"):
        behaviours.group_gap("gap", one, culpa.Behaviour("x", likelihood, None, unit="share"))


class Letters:
    """A tokenizer of letters: BOS 1, EOS 2."""

    eos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        found = [ord(c) - 90 for c in text]
        return {"input_ids": [1, *found] if add_special_tokens else found}


def test_completions_label_only_what_was_answered() -> None:
    batch = behaviours.completions(Letters(), ["ab", "a"], ["c", "bcd"])
    assert batch["input_ids"].tolist() == [[1, 7, 8, 9, 2, 0], [1, 7, 8, 9, 10, 2]]
    assert batch["labels"].tolist() == [
        [-100, -100, -100, 9, 2, -100],
        [-100, -100, 8, 9, 10, 2],
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]
    with pytest.raises(OptionError, match="no tokens"):
        behaviours.completions(Letters(), ["a"], [""])


def test_likelihood_of_completions() -> None:
    batch = behaviours.completions(Letters(), ["ab", "a"], ["c", "bcd"])
    logits = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    each = [
        [
            math.log(softmax(logits[row, at - 1].tolist())[label])
            for at, label in enumerate(batch["labels"][row].tolist())
            if label != -100
        ]
        for row in range(2)
    ]

    def found(per: str) -> list[float]:
        return values(behaviours.sequence_log_likelihood("b", batch, per=per), logits, Named)

    assert found("sequence") == pytest.approx([sum(row) for row in each])
    assert found("token") == pytest.approx([sum(row) / len(row) for row in each])
    assert found("each token") == pytest.approx(each[0] + each[1])
    first = {key: value[:1] for key, value in batch.items()}
    margin = behaviours.preference_margin("b", first, first)
    assert values(margin, logits[:1], Named) == [0.0]


def test_what_cannot_be_judged_is_said() -> None:
    nothing = {"input_ids": torch.zeros(1, 3), "labels": torch.full((1, 3), -100)}
    with pytest.raises(BehaviourError, match="no labelled token"):
        values(behaviours.sequence_log_likelihood("b", nothing), torch.zeros(1, 3, 4), Named)
    with pytest.raises(BehaviourError, match="missing"):
        values(behaviours.sequence_log_likelihood("b", {}), torch.zeros(1, 3, 4), Named)
    with pytest.raises(OptionError, match="per="):
        behaviours.sequence_log_likelihood("b", nothing, per="word")
    with pytest.raises(BehaviourError, match="from 0 to 1"):
        values(behaviours.accuracy("b", (None, torch.tensor([2]))), torch.zeros(1, 2))
    with pytest.raises(OptionError, match="bin"):
        behaviours.calibration_error("b", (None, torch.tensor([0])), bins=0)
