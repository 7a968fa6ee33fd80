"""docs/optimizers.md says of every class of torch.optim what the library does with it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import culpa
from culpa.dynamics.updates import CLOSED, Rules
from culpa.trajectory.optimizers import REFUSED, optimizer_class
from culpa.trajectory.schema import Group

PAGE = Path(__file__).resolve().parents[2] / "docs" / "optimizers.md"
ROWS = {
    cells[0].strip("`"): cells[1:]
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if re.match(r"\| `", line)
    for cells in [[cell.strip() for cell in line.strip("|").split("|")]]
}
CLASSES = {
    name
    for name, value in vars(torch.optim).items()
    if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
} - {"Optimizer"}


def test_every_class_has_a_row_and_no_other() -> None:
    assert ROWS.keys() == CLASSES


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_the_row_is_true(name: str) -> None:
    derivative, recorded, attributed, embedded, _ = ROWS[name]
    if recorded == "no":
        assert name in REFUSED
        assert (attributed, embedded) == ("no", "no")
        with pytest.raises(culpa.UnsupportedError, match=REFUSED[name]):
            optimizer_class(name)
        return
    assert (derivative == "written out") == (name in CLOSED)
    optimizer = getattr(torch.optim, name)(nn.Linear(2, 3, bias=False).parameters())
    hyper = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    groups = [Group(("weight",), hyper, name)]
    if attributed == "yes":
        assert embedded == "yes"
        Rules().require_differentiable(groups)
    else:
        assert (attributed, embedded, derivative) == ("no", "`Secant` only", "none: signs")
        with pytest.raises(culpa.UnsupportedError, match=r"signs.*Secant"):
            Rules().require_differentiable(groups)
