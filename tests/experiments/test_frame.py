"""Parts are kept, interrupted work goes on, and pages say what they must."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import culpa
from culpa.experiments.data.folder import DataFolder
from culpa.experiments.frame.experiment import Experiment, Setup
from culpa.experiments.frame.findings import Claim, Figure, Findings, Table
from culpa.experiments.frame.page import markdown, write_page
from culpa.experiments.frame.reproduce import reproduce
from culpa.experiments.frame.work import Part, Work
from culpa.experiments.registry import MODULES, experiment
from culpa.progress import Progress


class Options(msgspec.Struct, frozen=True):
    seeds: int = 3
    rate: float = 0.1


class Counting:
    """Progress that remembers."""

    def __init__(self) -> None:
        self.total = self.done = self.finished = 0

    def start(self, what: str, total: int) -> None:
        self.total = total

    def advance(self, units: int = 1) -> None:
        self.done += units

    def finish(self) -> None:
        self.finished += 1


def trained(options: Options, seed: int, part: Part) -> dict[str, Any]:
    model = torch.nn.Linear(2, 1)
    problem = culpa.Problem(model, lambda m, b: m(b[0]).square().mean())
    optimizer = torch.optim.SGD(model.parameters(), lr=options.rate)
    with culpa.record(part.folder("run"), problem, optimizer, overwrite=True) as recorder:
        for batch in recorder.batches([(torch.ones(4, 2) * (k + 1),) for k in range(3)]):
            optimizer.zero_grad()
            problem.loss(model, batch).backward()
            optimizer.step()
    return {"seed": seed, "updates": part.opened("run").num_steps, "pair": (1, 2)}


def an_experiment(fail_at: int | None = None) -> Experiment:
    def run(setup: Setup) -> Findings:
        setup.work.plan(len(setup.seeds))
        values = []
        for seed in setup.seeds:

            def make(part: Part, seed: int = seed) -> dict[str, Any]:
                value = trained(setup.options, seed, part)
                if seed == fail_at:
                    raise KeyboardInterrupt
                return value

            values.append(setup.work.part(f"seed-{seed}", {"seed": seed}, make))
        return Findings(
            settings="A line.",
            claims=(Claim("It is so.", True, "1 of 1."), Claim("It is not.", False, "0 of 1.")),
            tables=(Table("T", ("a", "b"), ((str(values[0]["pair"]), "2"),), "below"),),
            figures=(
                Figure("dots", "Two *dots*.", {"data": {"values": [{"x": 1}]}, "mark": "point"}),
            ),
            stand_ins=("this for that.",),
        )

    return Experiment("toy", "A toy", "Fig. 0", "something", {"small": Options()}, run)


def go(folder: Path, one: Experiment, **options: Any) -> Any:
    return reproduce(one, work=folder, data=DataFolder((folder,)), **options)


def test_an_interrupted_experiment_goes_on_with_what_is_finished(tmp_path: Path) -> None:
    watch = Counting()
    assert isinstance(watch, Progress)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, an_experiment(fail_at=1), progress=watch)
    assert (watch.total, watch.done, watch.finished) == (3, 1, 1)
    parts = tmp_path / "small" / "toy" / "parts"
    assert [p.name for p in parts.iterdir()] == ["seed-0.json"]
    before = (parts / "seed-0.json").stat().st_mtime_ns
    whole = go(tmp_path, an_experiment())
    assert (parts / "seed-0.json").stat().st_mtime_ns == before
    assert len(whole.runs) == 3
    kept = json.loads((parts / "seed-2.json").read_text())
    assert kept["options"] == {"rate": 0.1, "seed": 2}
    run = culpa.open_run(tmp_path / "small" / "toy" / "runs" / "seed-2" / "run")
    assert kept["runs"] == [
        {"name": "seed-2/run", "root_digest": run.root_digest, "updates": 3},
    ]


def test_a_resumed_result_is_that_of_one_go(tmp_path: Path) -> None:
    one = go(tmp_path / "a", an_experiment())
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "b", an_experiment(fail_at=2))
    two = go(tmp_path / "b", an_experiment())
    assert one.findings == two.findings
    assert "[1, 2]" in markdown(one)  # as JSON gives it back


def test_parts_made_with_other_options_are_made_again(tmp_path: Path) -> None:
    made: list[str] = []

    def make(part: Part) -> int:
        made.append(part.key)
        return len(made)

    for rate, expected in ((0.1, 1), (0.1, 1), (0.2, 2)):
        assert Work(tmp_path, {"rate": rate}).part("seed-0", {"seed": 0}, make) == expected
    assert Work(tmp_path, {"rate": 0.2}).part("seed-0", {"seed": 1}, make) == 3


def test_more_seeds_keep_those_that_are_there_and_fresh_forgets_them(tmp_path: Path) -> None:
    one = an_experiment()
    go(tmp_path, one, seeds=1)
    file = tmp_path / "small" / "toy" / "parts" / "seed-0.json"
    before = file.stat().st_mtime_ns
    assert len(go(tmp_path, one, seeds=2).runs) == 2
    assert file.stat().st_mtime_ns == before
    go(tmp_path, one, seeds=1, fresh=True)
    assert file.stat().st_mtime_ns != before


def test_runs_are_dropped_when_asked_and_their_digests_kept(tmp_path: Path) -> None:
    result = go(tmp_path, an_experiment(), keep_runs=False, seeds=1)
    assert not list((tmp_path / "small" / "toy" / "runs").glob("*"))
    assert len(result.runs[0].root_digest) == 64


def test_the_machine_named_is_the_one_that_did_the_work(tmp_path: Path) -> None:
    go(tmp_path, an_experiment(), seeds=1)
    file = tmp_path / "small" / "toy" / "parts" / "seed-0.json"
    kept = json.loads(file.read_text())
    file.write_text(json.dumps(kept | {"machine": "an abacus"}))
    assert go(tmp_path, an_experiment(), seeds=2).machine == f"an abacus; {kept['machine']}"


def test_a_damaged_part_is_told_and_not_trusted(tmp_path: Path) -> None:
    Work(tmp_path, {}).part("a", {}, lambda _: 1)
    (tmp_path / "parts" / "a.json").write_text('{"key": "a"')
    with pytest.raises(culpa.OptionError, match="--fresh"):
        Work(tmp_path, {}).part("a", {}, lambda _: 1)


def test_a_damaged_run_stops_its_experiment(tmp_path: Path) -> None:
    def spoil(part: Part) -> Any:
        trained(Options(), 0, part)
        target = min(part.folder("run").glob("states/*"))
        content = bytearray(target.read_bytes())
        content[-1] ^= 1
        target.write_bytes(bytes(content))
        return part.opened("run")

    with pytest.raises(culpa.IntegrityError):
        Work(tmp_path, {}).part("a", {}, spoil)
    assert not (tmp_path / "parts").exists()


def test_the_page_says_scale_stand_ins_seeds_and_machine(tmp_path: Path) -> None:
    result = go(tmp_path, an_experiment(), seeds=2)
    page, figure = write_page(result, tmp_path / "pages")
    text = page.read_text()
    assert "**Holds:** It is so. 1 of 1." in text
    assert "**Does not hold:** It is not. 0 of 1." in text
    assert "Scale `small`, 2 seeds; " in text
    assert "torch 2" in text
    assert "Stand-in: this for that." in text
    assert "![Two dots.](figures/toy-dots.svg)" in text
    assert figure.read_text().startswith("<svg")


def test_unknown_scales_experiments_and_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(culpa.OptionError, match="no scale 'paper'; it has small"):
        go(tmp_path, an_experiment(), scale="paper")
    with pytest.raises(culpa.OptionError, match="at least 1"):
        go(tmp_path, an_experiment(), seeds=0)
    with pytest.raises(culpa.OptionError, match="there are mnist-insert, "):
        experiment("mnist")


@pytest.mark.parametrize("name", MODULES)
def test_every_experiment_is_registered_under_its_name_with_three_scales(name: str) -> None:
    found = experiment(name)
    assert found.name == name
    assert set(found.scales) == {"paper", "small", "smoke"}
    assert all(options.seeds >= 1 for options in found.scales.values())
    assert all((found.title, found.paper, found.must_show))
