"""Records that decode and say what torch refuses: the error names the update and the field."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import culpa
from culpa.trajectory.log import execute
from culpa.trajectory.reader import COLUMNS
from culpa.trajectory.schema import state_name
from culpa.trajectory.state import State
from hostile import forge


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return forge.record(tmp_path_factory.mktemp("honest") / "run").path


@pytest.fixture
def run(honest: Path, tmp_path: Path) -> Path:
    return forge.copy_of(honest, tmp_path / "run")


def change_json(path: Path, table: str, column: str, change: Callable[[Any], Any]) -> None:
    """Change a JSON value in all rows of a table."""
    connection = sqlite3.connect(path / "log.sqlite")
    key = next(iter(COLUMNS[table]))
    for number, data in connection.execute(f"SELECT {key}, {column} FROM {table}").fetchall():
        value = msgspec.json.encode(change(msgspec.json.decode(data)))
        execute(connection, f"UPDATE {table} SET {column} = ? WHERE {key} = ?", (value, number))
    connection.commit()
    connection.close()


def hyper(**values: Any) -> Callable[[Path], None]:
    return lambda path: change_json(path, "hypers", "json", lambda gs: [g | values for g in gs])


def detail(**values: Any) -> Callable[[Path], None]:
    return lambda path: change_json(path, "step", "detail", lambda d: d | values)


def optimizer(name: str) -> Callable[[Path], None]:
    return lambda path: change_json(path, "optimizer", "json", lambda o: o | {"name": name})


def layout(old: bytes, new: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        data = culpa.open_run(path).tables.layouts[0].encode()
        assert old in data
        forge.sql(path, "UPDATE layout SET json = ?", values=(data.replace(old, new),))

    return change


def replay(path: Path) -> None:
    culpa.replay(culpa.open_run(path), forge.problem())


def from_the_middle(path: Path) -> None:
    culpa.replay(culpa.open_run(path), forge.problem(), without=[3], counterfactual="zero-gradient")


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a rate below zero": (hyper(lr=-1.0), r"update 0 .*does not reproduce"),
    "a rate that is text": (hyper(lr="fast"), r"update 0: .*hypers"),
    "a rate that is none": (hyper(lr=None), r"update 0: .*hypers"),
    "a rate beyond floats": (hyper(lr=10**400), r"update 0: .*hypers"),
    "betas of one": (hyper(betas=[0.9]), r"update 0: .*hypers"),
    "betas above one": (hyper(betas=[0.9, 7.0]), r"update 0: .*hypers"),
    "capturable on this device": (hyper(capturable=True), r"update 0: .*hypers"),
    "another class": (optimizer("Rprop"), r"update 0 .*does not reproduce"),
    "a class of other arguments": (optimizer("Adafactor"), r"update 0: .*hypers"),
    "no such class": (optimizer("system"), "'system' is not a class"),
    "the base class": (optimizer("Optimizer"), "'Optimizer' is not a class"),
    "no such submodule": (detail(evaluating=["no.such"]), r"update 0: .*evaluating"),
    "a parameter for a submodule": (
        detail(evaluating=["head.weight"]),
        r"update 0: .*evaluating",
    ),
    "weights beyond floats": (detail(weights=[1e308]), r"update 0 .*does not reproduce"),
    "a norm below zero": (detail(clip_grad_norm=-1.0), r"update 0 "),
    "gradients of nobody": (detail(without_gradient=["no.such"], reset=True), r"update 1 "),
    "another dtype": (layout(b'"float32"', b'"int32"'), r"update 0: loss\(model, batch\) fails"),
    "another key": (layout(b'"x"', b'"z"'), r"update 0: loss\(model, batch\) fails"),
    "another shape": (layout(b"[3]", b"[3,1]"), r"update 0: loss\(model, batch\) fails"),
}
STATES: dict[str, tuple[Callable[[State], Any], str]] = {
    "slot of another shape": (
        lambda s: s.slots["exp_avg"].update({"head.bias": torch.zeros(7)}),
        r"update 2: .*slots",
    ),
    "slot of nobody": (
        lambda s: s.slots["exp_avg"].update({"no.such": torch.zeros(7)}),
        r"'slots/exp_avg/no.such' belongs to no trained parameter",
    ),
    "slot of a frozen one": (
        lambda s: s.slots["exp_avg"].update({"embed.weight": torch.zeros(4, 3)}),
        r"belongs to no trained parameter",
    ),
    "slot missing": (lambda s: s.slots.pop("exp_avg_sq"), r"update 2: .*slots"),
    "parameter of another shape": (
        lambda s: s.params.update({"head.bias": torch.zeros(1)}),
        r"'params/head.bias' is float32 \[1\]; culpa.json says float32 \[2\]",
    ),
    "parameter of another dtype": (
        lambda s: s.params.update({"head.bias": torch.zeros(2).double()}),
        r"'params/head.bias' is float64",
    ),
    "parameter missing": (
        lambda s: s.params.pop("head.bias"),
        "lacks the tensor 'params/head.bias",
    ),
    "parameter more": (
        lambda s: s.params.update({"more": torch.zeros(2)}),
        "'params/more' is .*says nothing",
    ),
    "buffer missing": (lambda s: s.buffers.pop("norm.running_var"), "lacks the tensor 'buffers/"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_replay_of_what_torch_refuses_names_update_and_field(name: str, run: Path) -> None:
    change, message = REFUSED[name]
    change(run)
    with pytest.raises(culpa.CulpaError, match=message):
        replay(run)
    with pytest.raises(culpa.CulpaError):
        forge.examine(run)


@pytest.mark.parametrize("name", STATES)
def test_a_replay_from_a_forged_state_names_it(name: str, run: Path) -> None:
    change, message = STATES[name]
    kept = culpa.open_run(run).state(2)
    change(kept)
    (run / state_name(2)).write_bytes(kept.encode())
    with pytest.raises(culpa.CulpaError, match=message):
        from_the_middle(run)
    with pytest.raises(culpa.CulpaError):
        forge.examine(run)


def test_an_optimizer_cannot_be_said_to_hold_what_never_trained(run: Path) -> None:
    change_json(
        run, "optimizer", "json", lambda o: o | {"groups": [[*o["groups"][0], "embed.weight"]]}
    )
    with pytest.raises(culpa.CulpaError, match="update 0"):
        replay(run)
    with pytest.raises(culpa.IntegrityError, match="update 0"):
        forge.examine(run)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(
        [
            *("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "foreach", "capturable"),
            *("differentiable", "fused", "decoupled_weight_decay", "momentum", "x"),
        ]
    ),
    value=st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.lists(st.none() | st.booleans() | st.integers() | st.text(max_size=3), max_size=3),
)
def test_no_hyperparameter_gives_an_error_of_torch(
    name: str, value: Any, honest: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = forge.copy_of(honest, tmp_path_factory.getbasetemp() / "hypers")
    hyper(**{name: value})(path)
    for ask in (replay, from_the_middle):
        said = ""
        try:
            ask(path)
        except culpa.CulpaError as error:
            said = str(error)
        assert not said or "update" in said or "hypers" in said


def test_a_model_with_other_buffers_is_no_key_error(run: Path) -> None:
    problem = forge.problem()
    problem.model.register_buffer("more", torch.zeros(3))
    with pytest.raises(culpa.ProblemError, match=r"more: recorded nothing, given float32 \[3\]"):
        culpa.replay(culpa.open_run(run), problem)
    problem.model = nn.Sequential()
    with pytest.raises(culpa.ProblemError, match=r"embed\.weight: recorded float32"):
        culpa.replay(culpa.open_run(run), problem)


def test_the_loss_of_another_problem_is_a_problem_error(run: Path) -> None:
    def broken(model: nn.Module, batch: Any) -> torch.Tensor:
        return model(batch)["logits"]

    problem = culpa.Problem(forge.problem().model, broken)
    with pytest.raises(culpa.ProblemError, match=r"update 0: loss\(model, batch\) fails") as caught:
        culpa.replay(culpa.open_run(run), problem)
    assert isinstance(caught.value.__cause__, (IndexError, TypeError))
