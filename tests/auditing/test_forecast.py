"""The forecast against the jobs themselves, by a clock that counts gradients and not seconds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import culpa
from culpa.auditing.forecasting import resources
from culpa.auditing.forecasting.plan import history
from culpa.report import forecast as module

Batch = tuple[Tensor, Tensor]


class Counter:
    """A loss that counts how often it is asked for, and so the time of a machine of our own."""

    def __init__(self) -> None:
        self.calls = 0

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.calls += 1
        return cross_entropy(model(batch[0]), batch[1])

    def clock(self) -> float:
        return float(self.calls)


def batches(count: int, rows: int = 12) -> list[Batch]:
    draw = torch.Generator().manual_seed(3)
    return [
        (torch.randn(rows, 6, generator=draw), torch.randint(3, (rows,), generator=draw))
        for _ in range(count)
    ]


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, 3))


class Case:
    """A model, its optimizer and its loss; recorded where a run is wanted."""

    def __init__(self) -> None:
        self.counter = Counter()
        self.model = net()
        self.optimizer: Any = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.problem = culpa.Problem(self.model, self.counter.loss)
        self.behaviours = [culpa.log_likelihood("test", batches(1, 20)[0])]

    def plan(self, stages: dict[str, int], **options: Any) -> culpa.Plan:
        return culpa.Plan(self.problem, self.optimizer, batches(40), stages, **options)

    def train(self, folder: Path, stages: dict[str, int], **options: Any) -> culpa.Run:
        left = iter(batches(sum(stages.values())))
        with culpa.record(folder, self.problem, self.optimizer, **options) as recorder:
            for name, count in stages.items():
                with recorder.stage(name):
                    for batch in recorder.batches(next(left) for _ in range(count)):
                        self.optimizer.zero_grad()
                        self.problem.loss(self.model, batch).backward()
                        self.optimizer.step()
        return culpa.open_run(folder)

    def calls(self, work: Any) -> int:
        before = self.counter.calls
        work()
        return self.counter.calls - before


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


STAGES = {"a": 60, "b": 30, "c": 70}


def test_of_a_run_it_counts_the_gradients_of_every_job(tmp_path: Path) -> None:
    case = Case()
    run, problem, behaviours = case.train(tmp_path / "run", STAGES), case.problem, case.behaviours
    told = culpa.forecast(run, problem, behaviours, clock=case.counter.clock)
    jobs = {
        "replay": lambda: culpa.replay(run, problem),
        "attribute": lambda: culpa.attribute(run, problem, behaviours),
        "embed": lambda: culpa.embed(run, problem),
        "audit": lambda: culpa.audit(run, problem, behaviours),
    }
    assert set(told.jobs) == set(jobs)
    for name, job in jobs.items():
        assert told[name].seconds == pytest.approx(case.calls(job), rel=0.1), name


def test_of_a_plan_it_counts_them_before_there_is_a_run(tmp_path: Path) -> None:
    case = Case()
    told = culpa.forecast(case.plan(STAGES), behaviours=case.behaviours, clock=case.counter.clock)
    made: list[culpa.Run] = []
    jobs = {
        "record": lambda: made.append(case.train(tmp_path / "run", STAGES)),
        "replay": lambda: culpa.replay(made[0], case.problem),
        "attribute": lambda: culpa.attribute(made[0], case.problem, case.behaviours),
        "embed": lambda: culpa.embed(made[0], case.problem),
        "audit": lambda: culpa.audit(made[0], case.problem, case.behaviours),
    }
    for name, job in jobs.items():
        assert told[name].seconds == pytest.approx(case.calls(job), rel=0.1), name
    assert told["record"].disk == pytest.approx(made[0].bytes_on_disk, rel=0.25)


def test_stages_of_another_pace_are_told_apart(tmp_path: Path) -> None:
    case = Case()
    stages = {"slow": 40, "fast": 40}

    def slow(model: nn.Module, batch: Batch) -> Tensor:
        case.counter.calls += 4
        return case.counter.loss(model, batch)

    case.problem = culpa.Problem.by_stage(
        {
            "slow": culpa.Problem(case.model, slow),
            "fast": culpa.Problem(case.model, case.counter.loss),
        }
    )
    with culpa.record(tmp_path / "run", case.problem, case.optimizer) as recorder:
        for name, count in stages.items():
            with recorder.stage(name):
                for batch in recorder.batches(batches(count)):
                    case.optimizer.zero_grad()
                    case.problem.of(name).loss(case.model, batch).backward()
                    case.optimizer.step()
    run = culpa.open_run(tmp_path / "run")
    told = culpa.forecast(run, case.problem, case.behaviours, clock=case.counter.clock)
    replayed = case.calls(lambda: culpa.replay(run, case.problem))
    assert replayed == pytest.approx(40 * 5 + 40, rel=0.05)
    assert told["replay"].seconds == pytest.approx(replayed, rel=0.1)
    attributed = case.calls(lambda: culpa.attribute(run, case.problem, case.behaviours))
    assert told["attribute"].seconds == pytest.approx(attributed, rel=0.25)


POLICIES = [
    None,
    culpa.Every(7),
    culpa.AtStages(),
    culpa.All(),
    culpa.Thinned(),
    culpa.Budget(60_000),
]


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
@pytest.mark.parametrize("stages", [{"a": 3}, {"a": 20, "b": 45}, {"a": 1, "b": 130, "c": 2}])
def test_a_plan_knows_which_states_will_be_kept(
    policy: Any, stages: dict[str, int], tmp_path: Path
) -> None:
    case = Case()
    plan = case.plan(stages, checkpoints=policy)
    run = case.train(tmp_path / "run", stages, checkpoints=policy)
    size = max(n for name, n in run.source.files().items() if name.startswith("states/0"))
    planned, _ = history(plan, size)
    assert planned.kept_states == run.kept_states
    assert planned.num_steps == run.num_steps


@pytest.mark.parametrize("stepped", [0, 3])
def test_model_optimizer_and_generators_are_left_as_they_were(stepped: int) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
    data = batches(4)
    for batch in data[:stepped]:
        cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
    model[1].eval()
    plan = culpa.Plan(
        culpa.Problem(model, lambda m, b: cross_entropy(m(b[0]), b[1])), optimizer, data, 500
    )

    def everything() -> list[Any]:
        tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters())]
        slots = [v for held in optimizer.state.values() for v in held.values()]
        generators = (torch.get_rng_state(), random.getstate())
        return [
            [None if t is None else t.clone() for t in tensors],
            [v.clone() for v in slots],
            [{n: v for n, v in g.items() if n != "params"} for g in optimizer.param_groups],
            [m.training for m in model.modules()],
            [repr(g) for g in generators],
        ]

    identities = [id(t) for t in (*model.parameters(), *optimizer.state)]
    before = everything()
    culpa.forecast(plan, behaviours=[culpa.log_likelihood("test", data[0])])
    after = everything()
    for a, b in zip(before[0] + before[1], after[0] + after[1], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert before[2:] == after[2:]
    assert identities == [id(t) for t in (*model.parameters(), *optimizer.state)]


def test_longer_plans_take_more_memory_by_what_they_hold() -> None:
    case = Case()
    few, many = (
        culpa.forecast(case.plan({"a": count}), behaviours=case.behaviours)
        for count in (100, 100_000)
    )
    parameters = sum(p.nbytes for p in case.model.parameters())
    row = (6 * 4 + 8) * 12
    longer = 256 - 8  # updates between two kept states, of 100,000 and of 100
    noise = abs(many["replay"].memory - few["replay"].memory) + 3_000_000
    held = longer * (3 * parameters + row)  # the state with its momentum, the gradients, the batch
    assert many["attribute"].memory - few["attribute"].memory == pytest.approx(held, abs=noise)
    assert many["record"].disk > 100 * few["record"].disk


def test_examples_are_stored_once() -> None:
    case = Case()
    every = culpa.forecast(case.plan({"a": 5_000}))["record"].disk
    once = culpa.forecast(case.plan({"a": 5_000}, examples=480))["record"].disk
    rows = 5_000 * 12 - 480
    assert every - once == pytest.approx(rows * ((6 * 4 + 8) + 90), rel=0.05)


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = Case()
    told = culpa.forecast(case.plan(STAGES), behaviours=case.behaviours)
    for job in told.jobs:
        assert told.missing(job, tmp_path) == ""
        told.require(job, tmp_path)
    monkeypatch.setattr(module, "memory_left", lambda: -1)
    with pytest.raises(culpa.ResourceError, match=r"embed .* of memory.* fewer stages"):
        told.require("embed")
    monkeypatch.undo()
    monkeypatch.setattr(module, "disk_left", lambda folder: 1000)
    with pytest.raises(culpa.ResourceError, match=r"record .* of disk.* another folder"):
        told.require("record", tmp_path)
    told.require("embed")
    with pytest.raises(culpa.OptionError, match="has no job 'train': it has record"):
        told.require("train")


def test_a_model_that_sweeps_refuse_is_told_of(tmp_path: Path) -> None:
    case = Case()
    run = case.train(tmp_path / "run", {"a": 30})
    accuracy = culpa.Behaviour(
        "accuracy", lambda m, b: (m(b[0]).argmax(1) == b[1]).double(), batches(1)[0]
    )
    told = culpa.forecast(run, case.problem, [accuracy])
    assert "attribute" not in told.jobs
    assert "not differentiable" in told.found.refused["attribute"]
    assert "No attribute: " in told.table()
    with pytest.raises(culpa.OptionError, match="not differentiable"):
        told.require("attribute")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (lambda c, r: (r,), "needs the problem"),
        (lambda c, r: (c.plan(STAGES), c.problem), "takes no problem"),
        (lambda c, r: (c.plan({}),), "whole numbers of updates"),
        (lambda c, r: (culpa.Plan(c.problem, c.optimizer, [], 3),), "an empty one"),
    ],
)
def test_wrong_arguments(arguments: Any, said: str, tmp_path: Path) -> None:
    case = Case()
    run = case.train(tmp_path / "run", {"a": 2})
    with pytest.raises(culpa.OptionError, match=said):
        culpa.forecast(*arguments(case, run))


@pytest.mark.skipif(not resources.RESET.exists(), reason="only Linux tells a process's peak")
def test_the_peak_is_what_was_held_at_once() -> None:
    size = 200_000_000
    with resources.peak() as nothing:
        before = resources.resident()
    with resources.peak() as found:
        held = torch.ones(size // 4)
        del held
        held = torch.ones(size // 4)
        del held
    assert found.process - nothing.process == pytest.approx(size, rel=0.1)
    assert resources.resident() - before < size / 10
    assert resources.memory_left() > 0
    assert resources.disk_left(Path("/no/such/folder")) > 0
