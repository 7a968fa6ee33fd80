"""What a loop does to model or settings in the middle of a stage is told while recording."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import culpa
from culpa.trajectory import guard
from culpa.trajectory.guard import Budget

AT = 4
"""The update before which the loops here do what they should not."""


class Loop:
    """A training loop that can be disturbed."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Tanh(), nn.Linear(4, 2)
        )
        self.problem = culpa.Problem(
            self.model, lambda m, b: nn.functional.mse_loss(m(b), b[:, :2])
        )
        self.trained = [*self.model.parameters()][:-1]
        self.optimizer = torch.optim.Adam(self.trained, lr=0.05)
        self.factor = 1.0
        self.norm = 0.05
        self.batches = list(torch.randn(8, 5, 3, generator=torch.Generator().manual_seed(1)))

    def record(self, path: Path, disturb: Callable[[Loop], Any], **options: Any) -> culpa.Run:
        options.setdefault("clip_grad_norm", self.norm)
        with culpa.record(path, self.problem, self.optimizer, **options) as recorder:
            for k, batch in enumerate(recorder.batches(self.batches)):
                self.optimizer.zero_grad()
                (self.problem.loss(self.model, batch) * self.factor).backward()
                nn.utils.clip_grad_norm_([*self.model.parameters()][:-1], self.norm)
                self.optimizer.step()
                if k == AT - 1:
                    disturb(self)
        return culpa.open_run(path)


def weight(loop: Loop) -> nn.Parameter:
    return loop.model[0].weight  # type: ignore[return-value]


def rebind(loop: Loop) -> None:
    weight(loop).data = weight(loop).data * 0.99


def forward_in_training_mode(loop: Loop) -> None:
    with torch.no_grad():
        loop.model(loop.batches[0])


def freeze(loop: Loop) -> None:
    weight(loop).requires_grad_(False)


def through_numpy(loop: Loop) -> None:
    weight(loop).detach().numpy()[0, 0] += 1e-3


AT_ONCE: dict[str, tuple[Callable[[Loop], Any], str]] = {
    "in place": (lambda loop: nn.init.zeros_(weight(loop)), "0.weight changed"),
    "other memory": (rebind, "0.weight changed"),
    "forward in training mode": (forward_in_training_mode, "1.num_batches_tracked changed"),
    "buffer": (lambda loop: loop.model[1].running_mean.zero_(), "1.running_mean changed"),
    "group added": (
        lambda loop: loop.optimizer.add_param_group({"params": [loop.model[4].bias]}),
        "2 parameter groups are not those",
    ),
    "parameter added": (
        lambda loop: loop.optimizer.param_groups[0]["params"].append(loop.model[4].bias),
        "1 parameter groups are not those",
    ),
}
NOW_AND_THEN: dict[str, tuple[Callable[[Loop], Any], str]] = {
    "in place through data": (
        lambda loop: weight(loop).data.mul_(0.99),
        f"before update {AT} the tensor params/0.weight differs",
    ),
    "through numpy": (through_numpy, f"before update {AT} the tensor params/0.weight differs"),
    "buffer through data": (
        lambda loop: loop.model[1].running_mean.data.zero_(),
        f"before update {AT} the tensor buffers/1.running_mean differs",
    ),
    "another norm": (lambda loop: vars(loop).update(norm=0.01), f"update {AT} is not what"),
    "another factor": (
        lambda loop: vars(loop).update(factor=0.5, norm=1e9),
        f"update {AT} is not what",
    ),
}


@pytest.mark.parametrize("name", AT_ONCE)
def test_told_at_the_next_update(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Budget, "due", lambda self, trained: False)
    disturb, message = AT_ONCE[name]
    with pytest.raises(culpa.RecordError, match=message):
        Loop().record(tmp_path / "run", disturb)


@pytest.mark.parametrize("name", NOW_AND_THEN)
def test_told_by_the_next_check(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Budget, "due", lambda self, trained: True)
    disturb, message = NOW_AND_THEN[name]
    with pytest.raises(culpa.RecordError, match=message):
        Loop().record(tmp_path / "run", disturb)
    kept = culpa.open_run(tmp_path / "run")
    assert kept.num_steps == AT  # what came before is kept, and replays
    assert kept.verify(Loop().problem, level="replay").executed == AT


@pytest.mark.parametrize(
    "change",
    [
        lambda loop: None,
        freeze,
        lambda loop: loop.model[2].eval(),
        lambda loop: loop.optimizer.param_groups[0].update(lr=0.01),
        lambda loop: loop.optimizer.zero_grad(set_to_none=False),
    ],
    ids=["nothing", "requires_grad", "eval", "rate", "zeros"],
)
def test_what_the_record_says_anyway_is_no_fault(
    change: Callable[[Loop], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links: list[bytes] = []
    for checking in (True, False):
        monkeypatch.setattr(Budget, "due", lambda self, trained, answer=checking: answer)
        loop = Loop()
        run = loop.record(tmp_path / str(checking), change)
        assert run.verify(loop.problem, level="replay").executed == 8
        links.append(run.tables.log.row("step", 7)[7])
    assert links[0] == links[1]  # checking changes nothing of what is recorded


def test_checks_take_a_share_of_the_training_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(guard.time, "monotonic", lambda: now)
    budget, made = Budget(share=0.01), 0
    for trained in range(1000):
        if budget.due(float(trained)):
            with budget.spending():
                now += 0.5
            made += 1
        assert budget.spent <= 0.01 * trained + 0.5
    assert made == pytest.approx(1000 * 0.01 / 0.5, abs=1)


def test_a_check_that_raises_is_paid_for(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([1.0, 4.0])
    monkeypatch.setattr(guard.time, "monotonic", lambda: next(moments))
    budget = Budget()
    with pytest.raises(ValueError, match="no"), budget.spending():
        raise ValueError("no")
    assert budget.spent == 3.0
