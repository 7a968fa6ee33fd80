"""What is refused, with what message, and that refusing leaves nothing behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import culpa
from oracles.problems import affine, cross_entropy, held_out, parameter_sums, smooth
from oracles.recipes import DECAYING, sgd
from oracles.recording import Recorded, record


def short() -> Any:
    return affine({0: sgd(momentum=0.9)}, DECAYING)


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    return record(short(), tmp_path / "run")


def folder(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def train_three(path: Path, loss: Callable[[nn.Module, Any], Tensor]) -> None:
    plan = short()
    model = plan.model()
    optimizer = SGD(model.parameters(), lr=0.1)
    problem = culpa.Problem(model, loss)
    with (
        culpa.record(path, problem, optimizer) as recorder,
        recorder.stage("only"),
    ):
        for batch in recorder.batches(plan.batches[:3]):
            optimizer.zero_grad()
            value = loss(model, batch)
            (value.sum() if isinstance(value, Tensor) else model(batch[0]).sum()).backward()
            optimizer.step()


def squares(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square()


BAD_LOSSES: dict[str, tuple[Callable[[nn.Module, Any], Any], str]] = {
    "no-scalar": (squares, r"\(6, 3\)"),
    "one-element": (lambda m, b: squares(m, b).mean().reshape(1), r"\(1,\)"),
    "a-number": (lambda m, b: squares(m, b).mean().item(), "float"),
    "nan": (lambda m, b: squares(m, b).mean() * float("nan"), "nan"),
    "infinite": (lambda m, b: squares(m, b).mean() + float("inf"), "inf"),
}


@pytest.mark.parametrize("name", BAD_LOSSES)
def test_a_loss_that_is_none(name: str, tmp_path: Path) -> None:
    loss, given = BAD_LOSSES[name]
    with pytest.raises(culpa.CulpaError, match=given):
        train_three(tmp_path / "run", loss)
    # An interrupted run of no updates is the truth; one of some would not be.
    assert culpa.open_run(tmp_path / "run").num_steps == 0


def noise_from_the_system(model: nn.Module, batch: Any) -> Tensor:
    seed = int.from_bytes(os.urandom(7), "big")
    generator = torch.Generator().manual_seed(seed)
    noisy = batch[0] + torch.randn(batch[0].shape, generator=generator, dtype=torch.float64)
    return (model(noisy) - batch[1]).square().mean()


def test_a_loss_that_is_never_the_same_twice(tmp_path: Path) -> None:
    with pytest.raises(culpa.CulpaError, match=r"(?i)reproduc|same|twice|random"):
        train_three(tmp_path / "run", noise_from_the_system)


def test_an_optimizer_of_another_model(tmp_path: Path) -> None:
    plan = short()
    model, other = plan.model(), plan.model()
    both = SGD([*model.parameters(), *other.parameters()], lr=0.1)

    def train() -> None:
        with (
            culpa.record(tmp_path / "run", culpa.Problem(model, plan.loss), both) as recorder,
            recorder.stage("only"),
        ):
            for batch in recorder.batches(plan.batches[:1]):
                both.zero_grad()
                plan.loss(model, batch).backward()
                both.step()

    with pytest.raises(culpa.CulpaError, match=r"(?i)parameter") as caught:
        train()
    assert "(3, 4)" in str(caught.value)


def unknown_stage(recorded: Recorded) -> list[Callable[[], object]]:
    run, problem = recorded.run, recorded.problem
    return [
        lambda: culpa.replay(run, problem, without="sekond"),
        lambda: culpa.embed(run, problem, stages=["sekond"]),
        lambda: culpa.embed(run, problem)["sekond"],
        lambda: culpa.embed(run, problem).counterfactual("sekond"),
    ]


@pytest.mark.parametrize("which", range(4))
def test_an_unknown_stage(which: int, recorded: Recorded) -> None:
    with pytest.raises(culpa.CulpaError, match="sekond") as caught:
        unknown_stage(recorded)[which]()
    assert "second" in str(caught.value)  # what there is


@pytest.mark.parametrize("without", [[12], [-1], [3, 99]])
def test_an_update_outside_of_the_run(without: list[int], recorded: Recorded) -> None:
    with pytest.raises(culpa.CulpaError, match=str(max(without, key=abs))):
        culpa.replay(recorded.run, recorded.problem, without=without)


@pytest.mark.parametrize("call", ["replay", "embed", "attribute"])
def test_an_unknown_counterfactual(call: str, recorded: Recorded) -> None:
    more = [[culpa.Behaviour("sums", parameter_sums, None)]] if call == "attribute" else []
    with pytest.raises(culpa.CulpaError, match="leave-out") as caught:
        getattr(culpa, call)(recorded.run, recorded.problem, *more, counterfactual="leave-out")
    assert "zero-gradient" in str(caught.value)


def test_unknown_forms_and_orders(recorded: Recorded) -> None:
    for options in ({"form": "cubic"}, {"order": 7}, {"order": 0}):
        with pytest.raises(culpa.CulpaError, match=str(next(iter(options.values())))):
            culpa.embed(recorded.run, recorded.problem, **options)  # type: ignore[arg-type]


def nested(recorder: Any) -> None:
    with recorder.stage("outer"), recorder.stage("inner"):
        pass


def duplicate(recorder: Any) -> None:
    with recorder.stage("outer"):
        take(recorder)
    with recorder.stage("outer"):
        take(recorder)


def nameless(recorder: Any) -> None:
    with recorder.stage(""):
        take(recorder)


def empty(recorder: Any) -> None:
    with recorder.stage("outer"):
        pass


def take(recorder: Any) -> None:
    model, optimizer, plan = recorder.test_state
    for batch in recorder.batches(plan.batches[:2]):
        optimizer.zero_grad()
        plan.loss(model, batch).backward()
        optimizer.step()


class Handle:
    """A recorder and what a loop needs next to it."""

    def __init__(self, recorder: Any, *state: Any) -> None:
        self.stage, self.batches, self.test_state = recorder.stage, recorder.batches, state


@pytest.mark.parametrize(
    ("wrong", "given"),
    [(nested, "inner"), (duplicate, "outer"), (empty, "outer"), (nameless, "''")],
)
def test_stages_that_are_nested_repeated_empty_or_nameless(
    wrong: Callable[[Any], None], given: str, tmp_path: Path
) -> None:
    plan = short()
    model = plan.model()
    optimizer = SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(culpa.CulpaError, match=given),
        culpa.record(tmp_path / "run", culpa.Problem(model, plan.loss), optimizer) as recorder,
    ):
        wrong(Handle(recorder, model, optimizer, plan))


def test_some_stages_in_any_order(recorded: Recorded) -> None:
    chosen = culpa.Exact(at="gauss")
    found = culpa.embed(
        recorded.run, recorded.problem, stages=["third", "first"], propagator=chosen
    )
    assert set(found) == {"first", "third"}
    behaviour = culpa.Behaviour("sums", parameter_sums, None)
    rows = dict(zip(found, found.score(behaviour), strict=True))
    everything = culpa.embed(recorded.run, recorded.problem)
    every_row = dict(zip(everything, everything.score(behaviour), strict=True))
    for stage, row in rows.items():
        torch.testing.assert_close(row, every_row[stage])


BAD_BEHAVIOURS: dict[str, tuple[Callable[[nn.Module, Any], Any], str]] = {
    "mean": (lambda m, _: next(m.parameters()).sum(), r"\(\)"),
    "matrix": (lambda m, _: next(m.parameters()), r"\(3, 4\)"),
    "nothing": (lambda m, _: next(m.parameters()).reshape(-1)[:0], r"\(0,\)"),
    "number": (lambda m, _: 1.0, "float"),
    "nan": (lambda m, _: next(m.parameters()).reshape(-1) * float("nan"), "12 of 12"),
}


@pytest.mark.parametrize("call", ["attribute", "score", "effect", "replay"])
@pytest.mark.parametrize("name", BAD_BEHAVIOURS)
def test_a_behaviour_of_the_wrong_shape(name: str, call: str, recorded: Recorded) -> None:
    function, given = BAD_BEHAVIOURS[name]
    behaviour = culpa.Behaviour("the odd one", function, None)
    run, problem = recorded.run, recorded.problem
    calls: dict[str, Callable[[], object]] = {
        "attribute": lambda: culpa.attribute(run, problem, [behaviour]),
        "score": lambda: culpa.embed(run, problem).score(behaviour),
        "effect": lambda: culpa.embed(run, problem).effect(behaviour),
        "replay": lambda: culpa.replay(run, problem, without="third").effect(behaviour),
    }
    with pytest.raises(culpa.CulpaError, match=given) as caught:
        calls[call]()
    assert "the odd one" in str(caught.value)


def test_a_behaviour_without_gradient(recorded: Recorded) -> None:
    behaviour = culpa.Behaviour("cut off", lambda m, _: next(m.parameters()).detach()[0], None)
    with pytest.raises(culpa.CulpaError, match="cut off"):
        culpa.attribute(recorded.run, recorded.problem, [behaviour])
    # An effect needs none.
    assert culpa.embed(recorded.run, recorded.problem).effect(behaviour).shape == (3, 4)


def test_no_behaviours(recorded: Recorded) -> None:
    with pytest.raises(culpa.CulpaError):
        culpa.attribute(recorded.run, recorded.problem, [])


@pytest.mark.parametrize("what", ["absent", "empty", "other", "file"])
def test_a_folder_that_is_no_run(what: str, tmp_path: Path) -> None:
    path = tmp_path / "nothing here"
    if what == "file":
        path.write_bytes(b"a file")
    elif what != "absent":
        path.mkdir()
    if what == "other":
        (path / "notes.txt").write_text("not a run")
    with pytest.raises(culpa.CulpaError, match="nothing here"):
        culpa.open_run(path)


def test_a_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    path = tmp_path / "the run"
    record(short(), path)
    before = folder(path)
    assert before
    with pytest.raises(culpa.CulpaError, match="the run") as caught:
        record(smooth({0: sgd()}, DECAYING), path)
    assert "overwrite" in str(caught.value)
    assert folder(path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["the run"]


def test_asked_to_overwrite_there_is_only_the_new_run(tmp_path: Path) -> None:
    path = tmp_path / "the run"
    record(short(), path)
    again = record(smooth({0: sgd()}, DECAYING), path, overwrite=True)
    assert set(again.run.final_state()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["the run"]


def test_overwriting_never_deletes_a_folder_that_is_no_run(tmp_path: Path) -> None:
    path = tmp_path / "thesis"
    path.mkdir()
    (path / "chapter.txt").write_text("irreplaceable")
    with pytest.raises(culpa.CulpaError, match="thesis"):
        record(short(), path, overwrite=True)
    assert folder(path) == {"chapter.txt": b"irreplaceable"}


@pytest.mark.parametrize("call", ["replay", "embed", "attribute"])
def test_a_problem_with_another_model(call: str, recorded: Recorded) -> None:
    other = smooth({0: sgd()}, DECAYING).model()
    problem = culpa.Problem(other, cross_entropy)
    more = [[culpa.log_likelihood("right", held_out())]] if call == "attribute" else []
    with pytest.raises(culpa.CulpaError, match=r"0\.weight|weight"):
        getattr(culpa, call)(recorded.run, problem, *more)


@pytest.mark.parametrize("call", ["replay", "embed", "attribute"])
def test_a_problem_with_another_loss(call: str, recorded: Recorded) -> None:
    plan = short()
    problem = culpa.Problem(plan.model(), lambda m, b: 3 * plan.loss(m, b))
    more = [[culpa.Behaviour("sums", parameter_sums, None)]] if call == "attribute" else []
    with pytest.raises(culpa.CulpaError, match=r"(?i)(update|step) \d"):
        getattr(culpa, call)(recorded.run, problem, *more)
