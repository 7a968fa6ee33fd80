"""``record(frozen="reference")``: digests of the base only; the model gives the values again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import culpa
from culpa.trajectory.schema import FROZEN_NAME
from trajectory.test_format import check

Batch = tuple[Tensor, Tensor]


class Adapted(nn.Module):
    """A frozen base with a trained low-rank addition and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.base = nn.Linear(6, 40)
        self.down = nn.Linear(6, 2, bias=False)
        self.up = nn.Linear(2, 40, bias=False)
        self.head = nn.Linear(40, 3)
        self.base.requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(torch.tanh(self.base(inputs) + self.up(self.down(inputs))))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def batches(seed: int, count: int = 6) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        inputs = torch.randn(8, 6, generator=generator)
        yield inputs, torch.randint(3, (8,), generator=generator)


def problem_of(model: nn.Module) -> culpa.Problem:
    return culpa.Problem(model, loss)


def adapters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def train(
    path: Path,
    model: nn.Module,
    stages: tuple[str, ...] = ("one", "two"),
    *,
    until: int | None = None,
    **options: Any,
) -> nn.Module:
    optimizer = torch.optim.SGD(adapters(model), lr=0.1, momentum=0.9)
    with culpa.record(path, problem_of(model), optimizer, **options) as recorder:
        for seed, name in enumerate(stages):
            with recorder.stage(name):
                for at, batch in enumerate(recorder.batches(batches(seed))):
                    if at == until:
                        raise KeyboardInterrupt
                    optimizer.zero_grad()
                    loss(model, batch).backward()
                    optimizer.step()
    return model


def equal(found: dict[str, Tensor], model: nn.Module) -> None:
    expected = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.fixture
def both(tmp_path: Path) -> tuple[culpa.Run, culpa.Run]:
    train(tmp_path / "stored", Adapted())
    train(tmp_path / "named", Adapted(), frozen="reference")
    return culpa.open_run(tmp_path / "stored"), culpa.open_run(tmp_path / "named")


def test_values_are_not_on_disk_and_the_updates_are_the_same(
    both: tuple[culpa.Run, culpa.Run],
) -> None:
    stored, named = both
    base = Adapted().base
    raw = base.weight.detach().numpy().tobytes()
    assert raw in (stored.path / FROZEN_NAME).read_bytes()
    assert raw not in (named.path / FROZEN_NAME).read_bytes()
    links = [
        [row[1] for row in run.tables.log.rows("step", ("k", "chain"))] for run in (stored, named)
    ]
    assert links[0] == links[1]
    assert stored.frozen.digest() == named.frozen.digest()
    done = check(named.path)  # docs/format.md's checker, without culpa
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == named.root_digest
    named.verify()
    named.verify(problem_of(Adapted()), level="replay")


def test_every_estimate_is_that_of_a_run_with_values(both: tuple[culpa.Run, culpa.Run]) -> None:
    inputs, targets = next(batches(9))
    asked = culpa.log_likelihood("test", (inputs, targets))
    found: list[list[Tensor]] = []
    for run in both:
        problem = problem_of(Adapted())
        embedding = culpa.embed(culpa.open_run(run.path), problem)
        found.append(
            [
                culpa.attribute(culpa.open_run(run.path), problem, [asked]).steps,
                embedding.effect(asked),
                embedding.score(asked),
                culpa.replay(culpa.open_run(run.path), problem, without="one").effect(asked),
            ]
        )
        audit = culpa.audit(culpa.open_run(run.path), problem, [asked], budget=2.0)
        assert audit.table()
        equal(dict(problem.model.named_parameters()), Adapted())
    for stored, named in zip(*found, strict=True):
        assert torch.equal(stored, named)


def test_the_final_state_needs_the_base(tmp_path: Path) -> None:
    model = train(tmp_path / "run", Adapted(), frozen="reference")
    run = culpa.open_run(tmp_path / "run")
    with pytest.raises(culpa.StoreError, match=r"open_run\(path, frozen="):
        run.final_state()
    given = culpa.open_run(tmp_path / "run", frozen=dict(Adapted().named_parameters()))
    equal(given.final_state(), model)
    equal(dict(culpa.replay(run, problem_of(Adapted())).state), model)


@pytest.mark.parametrize("name", ["base.weight", "base.bias"])
def test_another_base_is_refused(name: str, tmp_path: Path) -> None:
    train(tmp_path / "run", Adapted(), frozen="reference")
    model = Adapted()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] += 1e-6
    with pytest.raises(culpa.ProblemError, match=f"1 of the 2 frozen.*{name}"):
        culpa.open_run(tmp_path / "run", frozen=dict(model.named_parameters()))
    with pytest.raises(culpa.ProblemError, match=name):
        culpa.replay(culpa.open_run(tmp_path / "run"), problem_of(model))


def test_a_base_that_is_written_to_later_is_noticed(tmp_path: Path) -> None:
    train(tmp_path / "run", Adapted(), frozen="reference")
    run, model = culpa.open_run(tmp_path / "run"), Adapted()
    culpa.replay(run, problem_of(model))
    with torch.no_grad():
        model.get_parameter("base.bias")[0] += 1.0
    with pytest.raises(culpa.ProblemError, match=r"base\.bias"):
        culpa.replay(run, problem_of(model))


def test_jobs_go_on_with_it(tmp_path: Path) -> None:
    model = train(tmp_path / "run", Adapted(), frozen="reference")
    train(tmp_path / "run", model, ("three",), append=True)
    run = culpa.open_run(tmp_path / "run")
    assert [stage.name for stage in run.stages] == ["one", "two", "three"]
    assert run.manifest.frozen_by_reference
    first = problem_of(Adapted())
    run.verify(culpa.Problem.by_stage({s.name: first for s in run.stages}), level="replay")
    with torch.no_grad():
        model.get_parameter("base.bias")[0] += 1.0
    with pytest.raises(culpa.ProblemError, match=r"base\.bias"):
        train(tmp_path / "run", model, ("four",), append=True)


def test_an_interrupted_run_is_resumed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", Adapted(), until=3, frozen="reference")
    resumed = train(tmp_path / "run", Adapted(), frozen="reference", resume=True)
    undisturbed = train(tmp_path / "other", Adapted())
    equal(dict(resumed.named_parameters()), undisturbed)
    assert culpa.open_run(tmp_path / "run").verify().finished


def test_what_was_named_only_may_not_train_later(tmp_path: Path) -> None:
    model = Adapted()
    first = torch.optim.SGD(adapters(model), lr=0.1)
    with culpa.record(tmp_path / "run", problem_of(model), first, frozen="reference") as recorder:
        model.get_submodule("base").requires_grad_(True)
        second = torch.optim.SGD(model.parameters(), lr=0.1)
        stage = recorder.stage("all", optimizer=second)
        with pytest.raises(culpa.RecordError, match=r"base\.bias.*frozen='stored'"):
            stage.__enter__()


def test_it_cannot_grow_and_other_words_are_refused(tmp_path: Path) -> None:
    train(tmp_path / "run", Adapted(), frozen="reference")
    with pytest.raises(culpa.UnsupportedError, match="frozen='stored'"):
        culpa.grow(culpa.open_run(tmp_path / "run"), tmp_path / "grown", Adapted())
    with pytest.raises(culpa.OptionError, match="'stored' or 'reference'"):
        train(tmp_path / "other", Adapted(), frozen="none")


@pytest.mark.parametrize("at", ["a digest", "a name"])
def test_a_changed_digest_is_noticed(at: str, tmp_path: Path) -> None:
    train(tmp_path / "run", Adapted(), frozen="reference")
    file = tmp_path / "run" / FROZEN_NAME
    data = bytearray(file.read_bytes())
    place = len(data) - 1 if at == "a digest" else data.index(b"base.bias") + 5
    data[place] ^= 1
    file.write_bytes(data)
    with pytest.raises(culpa.IntegrityError):
        culpa.open_run(tmp_path / "run").verify()
