"""Alignments of examples against a plain loop that differentiates log-odds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import culpa
from culpa.behaviours import log_likelihood, margin
from culpa.experiments.alignment import alignments, by_example
from culpa.experiments.pipeline import SGD, Job, loss, train

INPUTS = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3
ORDER = torch.stack(
    [torch.randperm(12, generator=torch.Generator().manual_seed(e)) for e in (1, 2)]
)
ROWS = ORDER.view(-1, 4)


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def slope(model: nn.Module, value: Tensor) -> Tensor:
    found = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in found])


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    p = torch.softmax(logits, 1)[torch.arange(len(labels)), labels]
    return torch.log(p / (1 - p))


def by_hand(asked: Tensor) -> Tensor:
    """The definition, in a plain loop: the states first, then what they say of every visit."""
    model, final = network(), network()
    optimizer = SGD(0.1, 0.9, 0.0)(final)
    states = []
    for rows in ROWS:
        states.append({n: t.clone() for n, t in final.state_dict().items()})
        optimizer.zero_grad()
        nn.functional.cross_entropy(final(INPUTS[rows]), LABELS[rows]).backward()
        optimizer.step()
    final.eval()
    towards = slope(final, log_odds(final(asked), torch.zeros(len(asked)).long()).mean())
    found = torch.zeros(12, dtype=torch.float64)
    for rows, state in zip(ROWS, states, strict=True):
        model.load_state_dict(state)
        odds = log_odds(model(INPUTS[rows]), LABELS[rows])
        for row, value in zip(rows.tolist(), odds, strict=True):
            found[row] += float(slope(model, value) @ towards)
    return found


def test_every_visit_counts_by_the_slope_of_its_log_odds(tmp_path: Path) -> None:
    job = Job("training", [(INPUTS[rows], LABELS[rows]) for rows in ROWS])
    problem = train(tmp_path / "run", network(), [job], SGD(0.1, 0.9, 0.0))
    run, asked = culpa.open_run(tmp_path / "run"), 2 * INPUTS[:5]
    behaviour = margin("log-odds of 0", (asked, torch.zeros(5).long()), soft=True)
    found = by_example(run, alignments(run, problem, behaviour))
    ids = [example for k in range(run.num_steps) for example in run.example_ids(k)]
    wanted = by_hand(asked)
    for example, row in zip(ids, ROWS.flatten().tolist(), strict=True):
        assert float(found[example]) == pytest.approx(float(wanted[row]), rel=1e-3, abs=1e-3)
    assert found.shape == (run.num_examples,)
    assert float(wanted.abs().max()) > 0.1


def test_it_needs_the_losses_of_examples(tmp_path: Path) -> None:
    job = Job("training", [(INPUTS, LABELS)])
    problem = train(tmp_path / "run", network(), [job], SGD(0.1))
    without = culpa.Problem(problem.model, loss)
    with pytest.raises(culpa.OptionError, match="example_losses"):
        alignments(culpa.open_run(tmp_path / "run"), without, log_likelihood("y", (INPUTS, LABELS)))
