"""A plain loop with ``accelerate.Accelerator``, recorded as docs/integrations.md says."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

accelerate = pytest.importorskip("accelerate")

import culpa
from oracles.compare import assert_bitwise, assert_tree_close, pearson
from oracles.retrain import parameters_of

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:accelerate")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"
DRAW = torch.Generator().manual_seed(0)
INPUTS = torch.randn(35, 5, generator=DRAW)
TARGETS = torch.randint(3, (35,), generator=DRAW)
ROWS, EPOCHS, RATE, STEPS, BOUND = 5, 2, 0.02, 3, 0.2
LIKELIHOOD = culpa.log_likelihood("likelihood", (INPUTS[:9], TARGETS[:9]))


@pytest.fixture(autouse=True)
def no_accelerator_yet() -> Iterator[None]:
    """accelerate keeps one state a process, the precision in it."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def net(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Dropout(dropout), nn.Linear(8, 3))


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def prepared(model: nn.Module, precision: str) -> tuple[Any, ...]:
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=STEPS
    )
    data = DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=ROWS)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    return accelerator, *accelerator.prepare(model, optimizer, data, schedule)


def train(model: nn.Module, precision: str = "no") -> nn.Module:
    """Without culpa."""
    accelerator, model, optimizer, loader, schedule = prepared(model, precision)
    torch.manual_seed(7)
    for _ in range(EPOCHS):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, batch))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), BOUND)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    return accelerator.unwrap_model(model)


def recorded(model: nn.Module, path: Path, precision: str = "no") -> nn.Module:
    """As the page says: its very lines are executed."""
    accelerator, model, optimizer, loader, schedule = prepared(model, precision)
    names = {"culpa": culpa, "path": path, "loss": loss_of, "accelerator": accelerator}
    names |= {"model": model, "optimizer": optimizer, "loader": loader, "scheduler": schedule}
    code = re.search(r"## Accelerate.*?```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert code
    torch.manual_seed(7)
    exec(code[1], names | {"epochs": EPOCHS, "bound": BOUND})
    return accelerator.unwrap_model(model)


def fresh(precision: str, dropout: float = 0.0) -> culpa.Problem:
    """As another process would build it."""
    accelerator, model, *_ = prepared(net(dropout), precision)
    return culpa.Problem(accelerator.unwrap_model(model), loss_of)


def by_hand(without: Collection[int]) -> dict[str, Tensor]:
    """Three losses an update, each divided by three, also in the last update of an epoch."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    update = 0
    for _ in range(EPOCHS):
        for first in range(0, 7, STEPS):
            skipped, update = update in without, update + 1
            if skipped:
                continue
            optimizer.zero_grad()
            for at in range(first, min(first + STEPS, 7)):
                rows = slice(at * ROWS, (at + 1) * ROWS)
                (loss_of(model, (INPUTS[rows], TARGETS[rows])) / STEPS).backward()
            nn.utils.clip_grad_norm_(model.parameters(), BOUND)
            optimizer.param_groups[0]["lr"] = RATE * 0.9 ** (update - 1)
            optimizer.step()
    return parameters_of(model)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_recipe_changes_nothing_and_every_update_replays(
    tmp_path: Path, precision: str
) -> None:
    plain = train(net(0.1), precision)
    watched = recorded(net(0.1), tmp_path / "run", precision)
    assert_bitwise(parameters_of(watched), parameters_of(plain))
    run, problem = culpa.open_run(tmp_path / "run"), fresh(precision, 0.1)
    assert run.num_steps == 6
    assert_bitwise(culpa.replay(run, problem).state, parameters_of(plain))
    scores = culpa.attribute(run, problem, [LIKELIHOOD]).steps[:, 0]
    truths = [
        float(culpa.replay(run, problem, without=[k]).effect(LIKELIHOOD).mean()) for k in range(6)
    ]
    assert pearson(scores, torch.tensor(truths)) > 0.95


def test_without_an_update_against_a_loop_by_hand(tmp_path: Path) -> None:
    recorded(net(), tmp_path / "run")
    run = culpa.open_run(tmp_path / "run")
    for without in ([], [0], [2], [5], [1, 3, 4]):
        found = culpa.replay(run, fresh("no"), without=without).state
        assert_tree_close(found, by_hand(without), 1e-5)
