"""Graphs that the replay leaves to the sweep: the same bits, within their budget, or not used."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, embedding, linear, scaled_dot_product_attention

import culpa
from culpa.dynamics.curvature.kept import Graph
from culpa.dynamics.graphs import Graphs

UPDATES = 12
Optimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Attending(nn.Module):
    """A tied embedding, layer normalisation, attention by torch's kernel, and dropout."""

    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(7, 8), nn.LayerNorm(8)
        self.mixed, self.out = nn.Linear(8, 8 + 8 * groups), nn.Linear(8, 8)
        self.dropout, self.groups = nn.Dropout(0.2), groups

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        parts = self.mixed(self.norm(x)).split([8, 4 * self.groups, 4 * self.groups], -1)
        q, k, v = (p.unflatten(-1, (-1, 4)).transpose(1, 2) for p in parts)
        fewer = self.groups == 1
        made = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=fewer)
        x = x + self.dropout(self.out(made.transpose(1, 2).flatten(-2)))
        return (x @ self.embedding.weight.T).transpose(1, 2)


class Tied(nn.Module):
    """One table for what words are and for how likely they are: a linear layer's, and looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 8))

    def forward(self, tokens: Tensor) -> Tensor:
        return linear(embedding(tokens, self.table).tanh(), self.table).transpose(1, 2)


def digits(generator: torch.Generator) -> tuple[Tensor, ...]:
    images = torch.randn(6, 2, 5, 5, generator=generator)
    return images, torch.randint(0, 3, (6,), generator=generator)


def words(generator: torch.Generator) -> tuple[Tensor, ...]:
    tokens = torch.randint(0, 7, (4, 6), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(50, 9), nn.ReLU(), nn.Linear(9, 3))


def normalised() -> nn.Module:
    convolved = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 2)
    return nn.Sequential(
        *convolved, nn.BatchNorm2d(3, momentum=None), nn.Flatten(), nn.Linear(12, 3)
    )


def frozen() -> nn.Module:
    model = perceptron()
    model[1].requires_grad_(False)  # pyright: ignore[reportCallIssue, reportArgumentType, reportIndexIssue]
    return model


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


@dataclass
class Case:
    """A training job; ``kept``: how many of its updates leave a graph."""

    model: Callable[[], nn.Module] = perceptron
    batch: Callable[[torch.Generator], tuple[Tensor, ...]] = digits
    optimizer: Optimizer = sgd
    clip: float | None = None
    parts: int = 1
    by_example: bool = False
    kept: int = UPDATES
    autocast: bool = False
    other: float = 0.0
    asked: dict[str, Any] = field(default_factory=dict[str, Any])


CASES = {
    "perceptron": Case(),
    "one layer": Case(lambda: nn.Sequential(nn.Flatten(), nn.Linear(50, 3))),
    "examples": Case(by_example=True),
    "examples of another loss": Case(by_example=True, kept=0, other=0.003),
    "frozen": Case(frozen),
    "clipped": Case(clip=0.1),
    "statistics": Case(normalised),
    "statistics and examples": Case(normalised, by_example=True),
    "attention": Case(Attending, words, adamw),
    "tied": Case(Tied, words),
    "micro-batches": Case(parts=2, kept=0),
    "a kernel of which there is no derivative": Case(lambda: Attending(1), words, adamw, kept=0),
    "autocast": Case(autocast=True),
    "no products": Case(kept=0, asked={"propagator": culpa.Identity()}),
    "differences": Case(kept=0, asked={"propagator": culpa.Exact("finite-difference")}),
}


def losses(case: Case, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    with torch.autocast("cpu", enabled=case.autocast):
        found = cross_entropy(model(batch[0]), batch[1], reduction="none")
    return found.flatten(1).float().mean(1) if found.ndim > 1 else found.float()


def record(case: Case, folder: Path) -> tuple[culpa.Run, culpa.Problem, list[culpa.Behaviour]]:
    torch.manual_seed(0)
    generator, model = torch.Generator().manual_seed(1), case.model()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return losses(case, model, batch).mean()

    problem = culpa.Problem(model, loss, lambda m, b: losses(case, m, b) * (1.0 + case.other))
    optimizer = case.optimizer(model)
    with culpa.record(folder, problem, optimizer, clip_grad_norm=case.clip) as recorder:
        for name in ("first", "second"):
            with recorder.stage(name):
                for _ in range(UPDATES // 2):
                    batches = [case.batch(generator) for _ in range(case.parts)]
                    with recorder.step(*batches):
                        optimizer.zero_grad()
                        for batch in batches:
                            (loss(model, batch) / case.parts).backward()
                        if case.clip is not None:
                            nn.utils.clip_grad_norm_(model.parameters(), case.clip)
                        optimizer.step()
    held_out = [case.batch(generator) for _ in range(2)]
    asked = [
        culpa.Behaviour(f"part {i}", lambda m, b: -losses(case, m, b), batch)
        for i, batch in enumerate(held_out)
    ]
    return culpa.open_run(folder), problem, asked


class Watched:
    """Counts what is taken, and the most that waits at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kept, self.most, self.size, self.unproved = 0, 0, 0, 0
        self.made, self.refused, self.since = WeakSet[Graph](), list[str](), 0
        take = Graphs.take

        def watched(graphs: Graphs, *given: Any) -> Any:
            found = take(graphs, *given)
            if found is not None:
                self.kept, self.size = self.kept + 1, found.graph.size
                self.unproved += not found.proved
                self.since += bool(self.refused)
                self.made.add(found.graph)
            self.most = max(self.most, graphs.waiting)
            return found

        refuse = Graphs.refuse

        def refused(graphs: Graphs, stage: str) -> None:
            self.kept -= 1
            self.refused.append(stage)
            refuse(graphs, stage)

        monkeypatch.setattr(Graphs, "take", watched)
        monkeypatch.setattr(Graphs, "refuse", refused)


@pytest.mark.parametrize("name", CASES)
def test_scores_are_the_same_to_the_last_bit(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]
    run, problem, asked = record(case, tmp_path / "run")
    options: dict[str, Any] = {"examples": case.by_example, "propagator": culpa.Exact()}
    options |= case.asked
    plain = culpa.attribute(run, problem, asked, hold=culpa.InMemory(graphs=0), **options)
    seen = Watched(monkeypatch)
    found = culpa.attribute(run, problem, asked, **options)
    assert max(0, seen.kept) == case.kept
    assert torch.equal(found.steps, plain.steps)
    assert found.trust == plain.trust
    if found.examples is not None and plain.examples is not None:
        assert torch.equal(found.examples, plain.examples)


def test_what_is_alike_is_proved_once_whatever_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, problem, asked = record(Case(), tmp_path / "run")
    seen = Watched(monkeypatch)
    culpa.attribute(run, problem, asked)
    assert len(run.stages) == 2
    assert (seen.kept, seen.unproved) == (UPDATES, 1)


def test_no_more_waits_than_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, problem, asked = record(Case(), tmp_path / "run")
    seen = Watched(monkeypatch)
    whole = culpa.attribute(run, problem, asked)
    one = seen.size
    assert one > 0
    assert seen.most >= 2 * one
    seen.kept = seen.most = 0
    part = culpa.attribute(run, problem, asked, hold=culpa.InMemory(graphs=2 * one + 1))
    assert seen.most == 2 * one
    assert 0 < seen.kept < UPDATES
    assert torch.equal(part.steps, whole.steps)
    seen.kept = 0
    culpa.attribute(run, problem, asked, hold=culpa.InMemory(graphs=one - 1))
    assert seen.kept == 0


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, problem, asked = record(Case(normalised), tmp_path / "run")
    seen = Watched(monkeypatch)
    culpa.attribute(run, problem, asked)
    gc.collect()
    assert seen.kept
    assert not seen.made


def test_another_loss_is_refused_as_ever(tmp_path: Path) -> None:
    run, problem, asked = record(Case(), tmp_path / "run")
    other = culpa.Problem(problem.model, lambda m, b: 1.01 * problem.loss(m, b))
    with pytest.raises(culpa.IntegrityError, match="does not reproduce"):
        culpa.attribute(run, other, asked)


@pytest.mark.parametrize("rate", [0.05, 1e-12])
@pytest.mark.parametrize("at", [1, 5, UPDATES - 1])
def test_a_gradient_that_is_not_the_loops_is_noticed(
    rate: float, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At the smaller rate no parameter moves: what is wrong is in the momentum alone.
    case = Case(optimizer=lambda model: torch.optim.SGD(model.parameters(), rate, momentum=0.9))
    run, problem, asked = record(case, tmp_path / "run")
    plain = culpa.attribute(run, problem, asked, hold=culpa.InMemory(graphs=0))
    take = Graphs.take

    def wrong(graphs: Graphs, record: Any, *given: Any) -> Any:
        found = take(graphs, record, *given)
        if found is not None and record.index == at:
            for grad in found.grads.values():
                grad.mul_(1.0 + 2e-7)
        return found

    monkeypatch.setattr(Graphs, "take", wrong)
    seen = Watched(monkeypatch)
    found = culpa.attribute(run, problem, asked)
    assert torch.equal(found.steps, plain.steps)
    assert found.trust == plain.trust
    assert seen.refused
    assert not seen.since  # all further updates are like the one that was refused


def test_where_they_do_not_wait_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, problem, asked = record(Case(), tmp_path / "run")
    seen = Watched(monkeypatch)
    for hold in (culpa.OnCpu(), culpa.OnDisk(), culpa.InMemory(dtype=torch.bfloat16)):
        culpa.attribute(run, problem, asked, hold=hold)
    culpa.attribute(run, problem, asked, allow_drift=True)
    assert seen.kept == 0


@pytest.mark.parametrize("graphs", [-1, True])
def test_a_budget_is_a_number_of_bytes(graphs: int) -> None:
    with pytest.raises(culpa.OptionError, match="number of bytes"):
        culpa.InMemory(graphs=graphs)
