"""Clipping by value and its derivative; the proof on the first update refuses any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import culpa
from culpa.dynamics.clip import clip, derivative
from culpa.trajectory.schema import OptimizerSpec, StepRecord
from oracles.loops import Loop, Open, assert_modelled, assert_replayed
from oracles.problems import cross_entropy, held_out, log_likelihoods, seeded, smooth
from oracles.recipes import DECAYING, sgd

BATCHES = smooth({0: sgd()}, DECAYING).batches
STAGES = (("first", 0, 4), ("second", 4, 7), ("third", 7, 9))


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3)).double()


def problem(model: nn.Module) -> culpa.Problem:
    return culpa.Problem(model, cross_entropy)


def clipped(how: Callable[[nn.Module], Any], **declared: float) -> Loop:
    def train(model: nn.Module, opened: Open) -> None:
        optimizer = SGD(model.parameters(), lr=0.01, momentum=0.9)
        with opened(problem(model), optimizer, **declared) as driver:
            for name, start, stop in STAGES:
                with driver.stage(name):
                    for batch in driver.batches(BATCHES[start:stop]):
                        optimizer.zero_grad()
                        cross_entropy(model, batch).backward()
                        how(model)
                        optimizer.step()

    return Loop(seeded(0, net), train, problem, log_likelihoods, held_out())


@pytest.mark.parametrize("bound", [0.02, 0.1, 10.0])
def test_clipping_by_value(bound: float, tmp_path: Path) -> None:
    def by_value(model: nn.Module) -> None:
        nn.utils.clip_grad_value_(model.parameters(), bound)

    loop = clipped(by_value, clip_grad_value=bound)
    run, again = assert_replayed(loop, tmp_path / "run")
    assert run.step(3).clip_grad_value == bound
    assert_modelled(loop, run, again)


@pytest.mark.parametrize("bound", [0.05, 10.0])
def test_clipping_by_norm(bound: float, tmp_path: Path) -> None:
    def by_norm(model: nn.Module) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), bound)

    loop = clipped(by_norm, clip_grad_norm=bound)
    run, again = assert_replayed(loop, tmp_path / "run")
    assert run.step(3).clip_grad_norm == bound
    assert_modelled(loop, run, again)


def record_of(**clipping: float) -> StepRecord:
    facts: dict[str, Any] = dict.fromkeys(("weights", "clip_grad_norm"))
    return StepRecord(
        index=0,
        optimizer=OptimizerSpec("SGD", (("a", "b"),)),
        hypers=({},),
        micro_batches=(),
        reset=False,
        drew_randomness=False,
        evaluating=(),
        without_gradient=(),
        digest=b"",
        fingerprints=b"",
        **facts | clipping,
    )


def random_trees(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)

    def normal() -> dict[str, Tensor]:
        shapes = {"a": (3, 2), "b": (4,)}
        return {
            n: torch.randn(*s, generator=generator, dtype=torch.float64) for n, s in shapes.items()
        }

    return normal(), normal(), normal()


@given(
    st.integers(0, 10_000),
    st.sampled_from(["clip_grad_norm", "clip_grad_value"]),
    st.floats(0.1, 5.0),
)
def test_the_derivative_is_that_of_torch(seed: int, kind: str, bound: float) -> None:
    grads, along, other = random_trees(seed)
    record = record_of(**{kind: bound})

    def by_torch(values: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {n: nn.Parameter(torch.zeros_like(v)) for n, v in values.items()}
        for name, value in values.items():
            leaves[name].grad = value.clone()
        way = nn.utils.clip_grad_norm_ if kind == "clip_grad_norm" else nn.utils.clip_grad_value_
        way(list(leaves.values()), bound)
        return {name: leaf.grad for name, leaf in leaves.items()}  # type: ignore[misc]

    found = clip(grads, record)
    for name, value in by_torch(grads).items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)
    step = 1e-6
    moved = [
        by_torch({n: g + sign * step * along[n] for n, g in grads.items()}) for sign in (1, -1)
    ]
    slope = derivative(grads, record, along)
    for name in grads:
        numeric = (moved[0][name] - moved[1][name]) / (2 * step)
        torch.testing.assert_close(slope[name], numeric, rtol=1e-4, atol=1e-5)
    # Symmetric: <u, J v> = <v, J u>.
    back = derivative(grads, record, other)
    forth = sum(float((other[n] * slope[n]).sum()) for n in grads)
    assert forth == pytest.approx(sum(float((along[n] * back[n]).sum()) for n in grads))


UNDECLARED: dict[str, Callable[[nn.Module], Any]] = {
    "by value": lambda m: nn.utils.clip_grad_value_(m.parameters(), 0.01),
    "by norm": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.01),
    "by the largest entry": lambda m: nn.utils.clip_grad_norm_(
        m.parameters(), 0.01, norm_type=float("inf")
    ),
    "of one layer": lambda m: nn.utils.clip_grad_norm_(m[0].parameters(), 0.01),  # type: ignore[index]
}


@pytest.mark.parametrize("name", list(UNDECLARED))
def test_undeclared_clipping_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(culpa.RecordError, match=r"update 0 is not what the record.*clip_grad"):
        clipped(UNDECLARED[name]).record(tmp_path / "run")


@pytest.mark.parametrize("name", ["by the largest entry", "of one layer"])
def test_another_norm_than_that_of_all_gradients_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(culpa.RecordError, match="update 0 is not what the record would say"):
        clipped(UNDECLARED[name], clip_grad_norm=0.01).record(tmp_path / "run")


def test_both_bounds_or_a_bound_of_zero_are_refused(tmp_path: Path) -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    options: list[dict[str, float]] = [
        {"clip_grad_value": 0.0},
        {"clip_grad_norm": -1.0},
        {"clip_grad_norm": 1.0, "clip_grad_value": 1.0},
    ]
    for declared in options:
        with (
            pytest.raises((culpa.OptionError, culpa.UnsupportedError), match=r"clip|order"),
            culpa.record(tmp_path / "run", problem(model), optimizer, **declared),
        ):
            pass
    assert not (tmp_path / "run").exists()
