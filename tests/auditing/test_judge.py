"""The audit against the truth: what it proves is what retraining without the stage gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import culpa
from culpa.auditing.ledger import RESULTS
from culpa.auditing.record import AuditRecord
from culpa.auditing.tasks import Outcome, Task
from oracles.fanned import without_times

STAGES = 5
PER_STAGE = 8
CULPRIT = "stage 2"


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def net() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(8)
    centres = 1.5 * torch.randn(3, 6, generator=generator)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for k in range(count):
        labels = torch.randint(3, (12,), generator=generator)
        inputs = centres[labels] + torch.randn(12, 6, generator=generator)
        wrong = k // PER_STAGE == 2
        found.append((inputs, (labels + 1) % 3 if wrong else labels))
    return found


def log_likelihoods(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return -cross_entropy(model(batch[0]), batch[1], reduction="none")


class Case:
    """A run with a mislabelled stage, recorded; and how to train it again without the library."""

    def __init__(self, folder: Path, rate: float = 0.05, named: bool = True) -> None:
        self.rate = rate
        *self.batches, unseen = batches(STAGES * PER_STAGE + 1)
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
        self.problem = culpa.Problem(model, loss)
        with culpa.record(folder, self.problem, optimizer) as recorder:
            for at in range(STAGES):
                part = self.batches[at * PER_STAGE : (at + 1) * PER_STAGE]
                if named:
                    with recorder.stage(f"stage {at}"):
                        self._train(model, optimizer, recorder.batches(part))
                else:
                    self._train(model, optimizer, recorder.batches(part))
        self.run = culpa.open_run(folder)
        self.behaviours = [culpa.Behaviour("right", log_likelihoods, unseen)]
        self.unseen = unseen

    def _train(self, model: nn.Module, optimizer: torch.optim.Optimizer, loader: Iterable) -> None:
        for batch in loader:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()

    def truth(self, start: int, stop: int) -> float:
        """The effect of the updates, by a plain loop that skips them."""
        values: list[float] = []
        for removed in (range(0), range(start, stop)):
            model = net()
            optimizer = torch.optim.SGD(model.parameters(), lr=self.rate, momentum=0.9)
            for k, batch in enumerate(self.batches):
                if k not in removed:
                    self._train(model, optimizer, [batch])
            with torch.no_grad():
                values.append(float(log_likelihoods(model, self.unseen).double().mean()))
        return values[0] - values[1]

    def audit(self, **options: object) -> AuditRecord:
        return culpa.audit(self.run, self.problem, self.behaviours, **options).record  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp("audit") / "run")


def checked(record: AuditRecord, case: Case) -> int:
    """Compare every replayed effect with retraining; how many there are."""
    replayed = [s for s in record.stages if s.replayed[0] is not None]
    for stage in replayed:
        assert stage.replayed[0] == pytest.approx(case.truth(stage.start, stage.stop), abs=1e-6)
    return len(replayed)


def test_all_stages_are_replayed_where_that_is_cheapest(case: Case) -> None:
    record = case.audit(budget=3.0)
    assert checked(record, case) == STAGES
    assert not any(stage.estimated for stage in record.stages)
    assert not [s for s in record.spent if "embeddings" in s.what]
    assert record.stopped.startswith("every stage was replayed")
    assert record.settled == [True]
    assert record.used <= record.budget == 3.0
    assert CULPRIT in record.verdicts[0]
    for stage in record.stages:
        split = next(x for x in record.layers if x.stage == stage.name)
        assert sum(split.effects.values()) + split.rest == pytest.approx(stage.replayed[0])
        assert abs(split.rest) < 0.05 * abs(stage.replayed[0] or 0.0) + 1e-4
        rows = record.updates.scores[stage.start : stage.stop]
        assert stage.sums[0] == pytest.approx(sum(row[0] for row in rows))


def test_a_small_budget_goes_where_the_ranking_is_open(case: Case) -> None:
    record = case.audit(budget=0.8)
    assert 0 < checked(record, case) < STAGES
    assert record.used <= 0.8 + 1e-9
    assert all(stage.estimated for stage in record.stages)
    for stage in record.stages:
        truth, half = case.truth(stage.start, stage.stop), stage.intervals[0]
        best = stage.effects[0] if stage.replayed[0] is None else stage.replayed[0]
        assert abs(best - truth) <= (0.0 if math.isnan(half) else half) + 1e-6
    assert CULPRIT in record.verdicts[0]


def test_no_budget_is_no_replay(case: Case) -> None:
    record = case.audit(budget=0.0)
    assert checked(record, case) == 0
    assert record.used == 0.0
    assert record.placebos == []
    assert any("no placebo" in caution for caution in record.cautions)


def test_it_stops_before_the_budget_is_spent_when_the_ranking_is_settled(case: Case) -> None:
    # Secant(1/8) costs next to nothing, so not everything is replayed although it could be.
    record = case.audit(budget=50.0, propagator=culpa.Secant(0.1))
    assert record.settled == [True]
    assert record.stopped.startswith("the ranking is settled")
    assert 0 < checked(record, case) < STAGES
    ranked = sorted(case.truth(s.start, s.stop) for s in record.stages)
    proved = sorted(s.replayed[0] for s in record.stages if s.replayed[0] is not None)
    assert proved[0] == pytest.approx(ranked[0], abs=1e-6)
    assert proved[-1] == pytest.approx(ranked[-1], abs=1e-6)


def test_chaos_is_not_identified(tmp_path: Path) -> None:
    wild = Case(tmp_path / "wild", rate=2.0)
    record = wild.audit(budget=12.0)
    hidden = [s for s in record.stages if s.grades[0] == "not identified"]
    assert hidden
    assert any("chaos" in caution for caution in record.cautions)
    for stage in hidden:
        assert abs(stage.replayed[0] or 0.0) <= stage.floors[0]
    assert "not identified" in record.updates.grades


def test_an_interrupted_audit_goes_on_from_where_it_was(case: Case, tmp_path: Path) -> None:
    work = tmp_path / "work"

    class Cut:
        """Stops after a number of tasks, as a person does."""

        def __init__(self, after: int) -> None:
            self.left = after
            self.done: list[Task] = []

        def map(self, work: Callable[[Task], Outcome], tasks: Sequence[Task]) -> Iterator[Outcome]:
            for task in tasks:
                if self.left == 0:
                    raise KeyboardInterrupt
                self.left -= 1
                self.done.append(task)
                yield work(task)

    with pytest.raises(KeyboardInterrupt):
        case.audit(budget=3.0, work=work, executor=Cut(3))
    assert len((work / RESULTS).read_bytes().split()) > 0
    with (work / RESULTS).open("ab") as file:
        file.write(b'{"key": "cut short')
    rest = Cut(99)
    resumed = case.audit(budget=3.0, work=work, executor=rest)
    whole = case.audit(budget=3.0)
    assert len(rest.done) == len(whole.spent) - 1 - 3  # one of them is the screening
    assert without_times(resumed) == without_times(whole)
    again = Cut(0)
    assert without_times(case.audit(budget=3.0, work=work, executor=again)) == without_times(whole)
    # Results of other options are not taken for these.
    with pytest.raises(KeyboardInterrupt):
        case.audit(budget=3.0, work=work, executor=again, counterfactual="restart")


def test_stages_are_found_where_none_were_named(tmp_path: Path) -> None:
    pytest.importorskip("ruptures", reason="needs: pip install 'culpa[segments]'")
    unnamed = Case(tmp_path / "run", named=False)
    record = unnamed.audit(budget=4.0)
    assert len(record.stages) > 1
    assert checked(record, unnamed) == len(record.stages)
    worst = min(record.stages, key=lambda s: s.replayed[0] or 0.0)
    overlap = set(range(worst.start, worst.stop)) & set(range(2 * PER_STAGE, 3 * PER_STAGE))
    assert len(overlap) >= PER_STAGE // 2
    assert any("names no stages" in caution for caution in record.cautions)
