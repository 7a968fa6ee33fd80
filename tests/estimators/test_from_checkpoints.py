"""Runs known by their stage checkpoints only, against skip-and-retrain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import culpa
from oracles.compare import (
    assert_bitwise,
    assert_close,
    assert_tree_close,
    difference,
    flat,
    pearson,
)
from oracles.problems import affine, cross_entropy, log_likelihoods, turned_digits, unseen_digits
from oracles.recipes import adamw, sgd
from oracles.recording import record
from oracles.retrain import Counterfactual, Plan, retrain, true_effects

RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum-decay": {"momentum": 0.9, "weight_decay": 0.1},
    "nesterov": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.05},
}
STAGES = (("first", 0, 7), ("second", 7, 12), ("third", 12, 15), ("fourth", 15, 21))
RATES = [(0.05 * (1 + 0.1 * (k % 4)),) for k in range(21)]


def full_batches(name: str, fresh: Sequence[bool] = (True,) * 4) -> Plan:
    """Least squares, the same batch at every update of a stage: quadratic and without noise."""
    build = sgd(**RULES[name])
    begun = {start: build for (_, start, _), new in zip(STAGES, fresh, strict=True) if new}
    plan = affine({0: build, **begun}, RATES, STAGES)
    stage_of = [start for _, start, stop in STAGES for _ in range(start, stop)]
    return replace(plan, batches=[plan.batches[start] for start in stage_of])


def checkpoints(plan: Plan) -> list[dict[str, Tensor]]:
    path = retrain(plan, keep_path=True).path
    return [path[0], *(path[stop] for _, _, stop in plan.stages)]


def described(plan: Plan, **rule: Any) -> list[culpa.CheckpointStage]:
    return [
        culpa.CheckpointStage(
            name,
            plan.batches[start:stop],
            steps=stop - start,
            learning_rate=[rate for (rate,) in plan.rates[start:stop]],
            fresh_optimizer=start in plan.optimizers,
            **rule,
        )
        for name, start, stop in plan.stages
    ]


def problem_of(plan: Plan) -> culpa.Problem:
    """The model at other weights: all that is needed is in the checkpoints."""
    model = plan.model()
    for parameter in model.parameters():
        parameter.data.mul_(-1.5).add_(0.25)
    return culpa.Problem(model, plan.loss)


def embedded(plan: Plan, name: str, **options: Any) -> culpa.StageEmbeddings:
    run = culpa.from_checkpoints(checkpoints(plan), described(plan, **RULES[name]))
    options.setdefault("propagator", culpa.Krylov(15, segments=2))
    return culpa.embed(run, problem_of(plan), **options)


@pytest.mark.parametrize(
    ("name", "segments"),
    [("plain", 1), ("momentum-decay", 1), ("nesterov", 1), ("momentum-decay", 2)],
)
def test_quadratic_stages_are_exact(name: str, segments: int) -> None:
    plan = full_batches(name)
    found = embedded(plan, name, propagator=culpa.Krylov(15, segments=segments))
    end = retrain(plan).parameters
    assert list(found) == [stage for stage, _, _ in plan.stages]
    for stage, start, stop in plan.stages:
        without = retrain(plan, range(start, stop), "skip").parameters
        assert_tree_close(found[stage], difference(end, without), 1e-8)
        assert_tree_close(found.counterfactual(stage), without, 1e-8)
        # Nothing is left out, and the estimate of what is says so.
        assert not found.trust[stage].residual > 1e-8
    assert found.facts["source"] == "stage checkpoints"


@pytest.mark.parametrize("counterfactual", ["skip", "restart"])
@pytest.mark.parametrize(
    "fresh",
    [(True, False, False, False), (True, False, True, False), (True, True, False, False)],
)
@pytest.mark.parametrize("name", ["momentum-decay", "nesterov"])
def test_momentum_that_goes_on_is_reconstructed(
    name: str, fresh: tuple[bool, ...], counterfactual: Counterfactual
) -> None:
    plan = full_batches(name, fresh)
    krylov = culpa.Krylov(15, segments=1)
    found = embedded(plan, name, counterfactual=counterfactual, propagator=krylov)
    end = retrain(plan).parameters
    for stage, start, stop in plan.stages:
        without = retrain(plan, range(start, stop), counterfactual).parameters
        assert_tree_close(found[stage], difference(end, without), 1e-8)
    # Exact here, where every batch is known; in general not, and so never trusted.
    known = [True] * 4
    for at in range(3):
        known[at] = all(fresh[at + 1 :])
    grades = [found.trust[stage].grade == "trusted" for stage, _, _ in plan.stages]
    assert grades == known


@pytest.mark.parametrize("stage", ["second", "third", "fourth"])
def test_alone_a_stage_is_what_it_is_with_the_others(stage: str) -> None:
    # Whatever is left out for it: the momentum it begins with is still needed.
    plan = full_batches("momentum-decay", (True, False, True, False))
    krylov = culpa.Krylov(4, segments=1)
    every, alone = (
        embedded(plan, "momentum-decay", propagator=krylov, stages=names)
        for names in (None, [stage])
    )
    assert list(alone) == [stage]
    assert_tree_close(alone[stage], every[stage], 1e-12)


def test_a_reconstruction_that_diverges_is_refused(digits: Plan) -> None:
    # A rate at which no such path could have been trained, in segments as long as the stage.
    stages = [
        replace(stage, steps=4000, learning_rate=3.0, momentum=0.9)
        for stage in described(digits, momentum=0.9)
    ]
    run = culpa.from_checkpoints(checkpoints(digits), stages)
    with pytest.raises(culpa.ProblemError, match=r"diverged.*segments"):
        culpa.embed(run, problem_of(digits), propagator=culpa.Krylov(4, segments=1))


def test_too_low_a_rank_is_not_exact_and_says_so() -> None:
    plan = full_batches("momentum-decay")
    found = embedded(plan, "momentum-decay", propagator=culpa.Krylov(2, segments=1))
    end, without = retrain(plan).parameters, retrain(plan, range(7)).parameters
    with pytest.raises(AssertionError, match="relative gap"):
        assert_tree_close(found["first"], difference(end, without), 1e-4)
    assert found.trust["first"].residual > 1e-4


@pytest.fixture(scope="module")
def digits() -> Plan:
    build = sgd(momentum=0.9)
    base = turned_digits(build, 0.01, lengths=(40, 20, 20))
    return replace(base, optimizers={0: build, 40: build, 60: build})


def test_real_digits_against_retraining(digits: Plan) -> None:
    run = culpa.from_checkpoints(checkpoints(digits), described(digits, momentum=0.9))
    found = culpa.embed(run, problem_of(digits))
    for turns in range(3):
        batch = unseen_digits(turns=turns)
        removed = [range(start, stop) for _, start, stop in digits.stages]
        truth = true_effects(digits, removed, log_likelihoods, batch)
        effect = found.effect(culpa.log_likelihood("right", batch))
        assert effect.shape == truth.shape
        for stage in range(3):
            assert pearson(effect[stage], truth[stage]) >= 0.99, (turns, stage)
        assert_close(effect[-1], truth[-1], 1e-5)
    assert {trust.grade for trust in found.trust.values()} == {"trusted"}


def test_the_cost_does_not_depend_on_the_number_of_updates() -> None:
    class Count:
        def __init__(self) -> None:
            self.units, self.total, self.done = 0, 0, False

        def start(self, what: str, total: int) -> None:
            self.total = total

        def advance(self, units: int = 1) -> None:
            self.units += units

        def finish(self) -> None:
            self.done = True

    seen: set[tuple[int, int]] = set()
    plan = full_batches("plain")
    for longer in (1, 50):
        stages = [
            replace(stage, steps=stage.steps * longer, learning_rate=1e-3)
            for stage in described(plan)
        ]
        watch, calls = Count(), 0

        def counted(model: nn.Module, batch: Any) -> Tensor:
            nonlocal calls
            calls += 1
            return plan.loss(model, batch)

        run = culpa.from_checkpoints(checkpoints(plan), stages)
        problem = culpa.Problem(plan.model(), counted)
        culpa.embed(run, problem, propagator=culpa.Krylov(3, segments=2), progress=watch)
        assert watch.done
        assert watch.units == watch.total > 0
        seen.add((watch.total, calls))
    assert len(seen) == 1, seen


def test_files_and_state_dicts_are_the_same(digits: Plan, tmp_path: Path) -> None:
    held = checkpoints(digits)
    names = ["step0", "step9", "step10", "step100"]
    for name, tensors in zip(names, held, strict=True):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    stages = described(digits, momentum=0.9)
    files = [tmp_path / f"{name}.safetensors" for name in names]
    runs = [culpa.from_checkpoints(source, stages) for source in (held, tmp_path, files)]
    assert len({run.root_digest for run in runs}) == 1
    found = [
        culpa.embed(run, problem_of(digits), propagator=culpa.Krylov(2, segments=2)) for run in runs
    ]
    for other in found[1:]:
        for stage in found[0]:
            assert_bitwise(other[stage], found[0][stage])


def test_embeddings_can_be_saved(digits: Plan, tmp_path: Path) -> None:
    run = culpa.from_checkpoints(checkpoints(digits), described(digits, momentum=0.9))
    found = culpa.embed(run, problem_of(digits), propagator=culpa.Krylov(2, segments=2))
    found.save(tmp_path / "e.safetensors")
    again = culpa.StageEmbeddings.load(tmp_path / "e.safetensors")
    for stage in found:
        assert_bitwise(again[stage], found[stage])


def dropped_out() -> tuple[culpa.CheckpointRun, culpa.Problem]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, 3))
    model[1].eval()
    held = [{n: torch.randn_like(p) for n, p in model.named_parameters()} for _ in range(3)]
    data = (torch.randn(20, 5), torch.randint(0, 3, (20,)))
    stages = [culpa.CheckpointStage(n, data, steps=30, learning_rate=0.01) for n in "ab"]
    return culpa.from_checkpoints(held, stages), culpa.Problem(model, cross_entropy)


def test_the_model_and_the_generators_are_left_as_they_were() -> None:
    run, problem = dropped_out()
    before = {name: value.clone() for name, value in problem.model.state_dict().items()}
    modes = [module.training for module in problem.model.modules()]
    state = torch.get_rng_state()
    first = culpa.embed(run, problem)
    assert torch.equal(torch.get_rng_state(), state)
    assert_bitwise(problem.model.state_dict(), before)
    assert [module.training for module in problem.model.modules()] == modes
    assert all(p.grad is None for p in problem.model.parameters())
    # From the same generators the same numbers: dropout is held fixed, not averaged away.
    again = culpa.embed(run, problem)
    assert_bitwise(again["a"], first["a"])


def test_both_paths_drop_the_same_units() -> None:
    run, problem = dropped_out()
    # Nothing but the draws of dropout could tell the two paths apart.
    start = run.checkpoint(1)
    same = culpa.from_checkpoints([start, start, run.checkpoint(2)], run.described)
    found = culpa.embed(same, problem)
    assert all(torch.equal(value, torch.zeros_like(value)) for value in found["a"].values())


def test_a_run_tells_what_it_is(digits: Plan) -> None:
    run = culpa.from_checkpoints(checkpoints(digits), described(digits, momentum=0.9))
    assert run.num_steps == 80
    assert [(s.name, s.start, s.stop) for s in run.stages] == list(digits.stages)
    assert_bitwise(run.final_state(), retrain(digits).parameters)
    assert run.final_buffers() == {}
    assert "stage 2 [40, 60)" in repr(run)


def batch_of_rows(rows: int = 6) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 4, dtype=torch.float64), torch.randn(rows, 3, dtype=torch.float64)


def stage(name: str = "s", **options: Any) -> culpa.CheckpointStage:
    return culpa.CheckpointStage(
        name, **{"data": batch_of_rows(), "steps": 5, "learning_rate": 0.1, **options}
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": -3}, "steps=-3"),
        ({"learning_rate": [0.1, 0.2]}, "2 rates for 5"),
        ({"learning_rate": -0.1}, "learning_rate=-0.1"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"nesterov": True}, "nesterov"),
        ({"name": ""}, "name"),
        ({"data": []}, "empty"),
        ({"data": ()}, "empty"),
        ({"data": batch_of_rows(0)}, "empty"),
    ],
)
def test_stages_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(culpa.OptionError, match=message):
        stage(**options)


def test_adaptive_optimizers_are_refused_by_name() -> None:
    with pytest.raises(culpa.UnsupportedError, match=r"AdamW.*culpa\.record"):
        stage(optimizer="AdamW")


MODEL = nn.Linear(4, 3).double()
STATE = {name: value.detach() for name, value in MODEL.state_dict().items()}


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_one_checkpoint_more_than_stages(count: int) -> None:
    with pytest.raises(culpa.StoreError, match=f"2 stages need 3 checkpoints.*got {count}"):
        culpa.from_checkpoints([STATE] * count, [stage("a"), stage("b")])


def test_checkpoints_that_are_none(tmp_path: Path) -> None:
    both = [stage("a"), stage("b")]
    with pytest.raises(culpa.StoreError, match="no folder"):
        culpa.from_checkpoints(tmp_path / "nowhere", both)
    with pytest.raises(culpa.StoreError, match="got 0 in"):
        culpa.from_checkpoints(tmp_path, both)
    pickled = tmp_path / "model.pt"
    torch.save(STATE, pickled)
    with pytest.raises(culpa.StoreError, match="weights_only"):
        culpa.from_checkpoints([pickled] * 3, both)
    with pytest.raises(culpa.StoreError, match="'model', which is no tensor"):
        culpa.from_checkpoints([{"model": STATE}] * 3, both)
    other = {"weight": torch.zeros(2, 2), "bias": STATE["bias"]}
    with pytest.raises(culpa.StoreError, match=r"checkpoint 2.*weight"):
        culpa.from_checkpoints([STATE, STATE, other], both)


def test_stages_must_be_there_and_differ() -> None:
    with pytest.raises(culpa.StageError, match="at least one"):
        culpa.from_checkpoints([STATE], [])
    with pytest.raises(culpa.StageError, match="'a' comes twice"):
        culpa.from_checkpoints([STATE] * 3, [stage("a"), stage("a")])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"weight": STATE["weight"]}, "bias is missing"),
        ({**STATE, "head": torch.zeros(2)}, "head is no tensor of the model"),
        ({**STATE, "weight": torch.zeros(3, 5).double()}, r"weight is .*\[3, 5\]"),
        ({**STATE, "weight": STATE["weight"].float()}, "float32"),
    ],
)
def test_checkpoints_of_another_model(tensors: dict[str, Tensor], message: str) -> None:
    run = culpa.from_checkpoints([tensors] * 2, [stage("a")])
    with pytest.raises(culpa.ProblemError, match=message):
        culpa.embed(run, culpa.Problem(MODEL, cross_entropy))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stages": ["nope"]}, culpa.StageError, "'a', 'b'"),
        ({"stages": []}, culpa.StageError, "no stage"),
        ({"propagator": culpa.Exact()}, culpa.UnsupportedError, "Krylov"),
        ({"counterfactual": "zero-gradient"}, culpa.UnsupportedError, "zero-gradient"),
        ({"counterfactual": "never"}, culpa.OptionError, "never"),
        ({"form": "additive"}, culpa.OptionError, "additive"),
        ({"order": 2}, culpa.UnsupportedError, "order=2"),
    ],
)
def test_what_checkpoints_cannot_answer(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    run = culpa.from_checkpoints([STATE] * 3, [stage("a"), stage("b")])
    with pytest.raises(error, match=message):
        culpa.embed(run, culpa.Problem(MODEL, cross_entropy), **options)


def test_running_statistics_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    first = {name: value.clone() for name, value in model.state_dict().items()}
    last = {**first, "1.running_mean": first["1.running_mean"] + 1}
    run = culpa.from_checkpoints([first, last], [stage("a")])
    with pytest.raises(culpa.UnsupportedError, match=r"1\.running_mean"):
        culpa.embed(run, culpa.Problem(model, cross_entropy))


def test_a_recording_is_not_followed_by_krylov(tmp_path: Path) -> None:
    recorded = record(turned_digits(adamw(), 1e-3, lengths=(2, 2, 2)), tmp_path / "run")
    with pytest.raises(culpa.UnsupportedError, match="Exact"):
        culpa.embed(recorded.run, recorded.problem, propagator=culpa.Krylov())
    asked = [culpa.log_likelihood("right", unseen_digits(5))]
    with pytest.raises(culpa.UnsupportedError, match="Exact"):
        culpa.attribute(recorded.run, recorded.problem, asked, propagator=culpa.Krylov())


def test_the_error_against_a_recording(digits: Plan, tmp_path: Path) -> None:
    recorded = record(digits, tmp_path / "run")
    run = culpa.from_checkpoints(checkpoints(digits), described(digits, momentum=0.9))
    found = culpa.embed(run, problem_of(digits))
    errors = culpa.compare_with_recording(found, recorded.run, recorded.problem)
    end = retrain(digits).parameters
    for name, start, stop in digits.stages:
        truth = difference(end, retrain(digits, range(start, stop)).parameters)
        missed = float(flat(difference(found[name], truth)).norm() / flat(truth).norm())
        assert errors[name] == pytest.approx(missed, rel=1e-6, abs=1e-12)
    assert errors["stage 3"] == 0.0 < errors["stage 2"] < 0.1
    other = culpa.from_checkpoints(list(reversed(checkpoints(digits))), run.described)
    wrong = culpa.embed(other, problem_of(digits), propagator=culpa.Krylov(2, segments=1))
    with pytest.raises(culpa.OptionError, match="no recording of the run"):
        culpa.compare_with_recording(wrong, recorded.run, recorded.problem)
