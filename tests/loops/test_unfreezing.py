"""What trains changes from stage to stage: parameters join, stand still again, or are adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import culpa
from oracles.compare import assert_bitwise
from oracles.loops import Loop, Open, assert_modelled, assert_replayed
from oracles.problems import cross_entropy, held_out, log_likelihoods, seeded, smooth
from oracles.recipes import DECAYING, sgd
from oracles.retrain import parameters_of

BATCHES = smooth({0: sgd()}, DECAYING).batches
STAGES = (("first", 0, 4), ("second", 4, 7), ("third", 7, 9))
Begin = Callable[[nn.Module, str, Optimizer | None], Optimizer]
"""The optimizer of a stage that begins, given the one before it."""


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3)).double()


def momentum(params: object) -> SGD:
    return SGD(params, lr=0.01, momentum=0.9)  # type: ignore[arg-type]


def make(begin: Begin, build: Callable[[], nn.Module] = net) -> Loop:
    def train(model: nn.Module, opened: Open) -> None:
        optimizer = begin(model, "first", None)
        with opened(culpa.Problem(model, cross_entropy), optimizer) as driver:
            for name, start, stop in STAGES:
                replaced = {}
                if start > 0 and (following := begin(model, name, optimizer)) is not optimizer:
                    optimizer = following
                    replaced = {"optimizer": optimizer}
                with driver.stage(name, **replaced):
                    for batch in driver.batches(BATCHES[start:stop]):
                        optimizer.zero_grad()
                        cross_entropy(model, batch).backward()
                        optimizer.step()

    def problem(model: nn.Module) -> object:
        return culpa.Problem(model, cross_entropy)

    return Loop(seeded(0, build), train, problem, log_likelihoods, held_out())


def unfrozen(model: nn.Module, stage: str, before: Optimizer | None) -> Optimizer:
    """The head; everything; everything."""
    model[0].requires_grad_(stage != "first")
    if stage == "third":
        assert before is not None
        return before
    return momentum(model[2].parameters() if stage == "first" else model.parameters())


def frozen_again(model: nn.Module, stage: str, before: Optimizer | None) -> Optimizer:
    """Everything; the head; the first layer, whose gradients depend on the head's change."""
    layer = {"first": model, "second": model[2], "third": model[0]}[stage]
    model.requires_grad_(False)
    layer.requires_grad_(True)
    return momentum(layer.parameters())


def another_group(model: nn.Module, stage: str, before: Optimizer | None) -> Optimizer:
    """The first layer joins the head's optimizer, whose momentum goes on."""
    if before is None:
        model[0].requires_grad_(False)
        return momentum(model[2].parameters())
    if stage == "second":
        model[0].requires_grad_(True)
        before.add_param_group({"params": list(model[0].parameters()), "lr": 0.02})
    return before


def toggled(model: nn.Module, stage: str, before: Optimizer | None) -> Optimizer:
    """One optimizer over everything; a layer's gradient is switched off for a stage."""
    model[0].requires_grad_(stage != "second")
    return before or momentum(model.parameters())


class Adapted(nn.Module):
    """A linear map with a low-rank adapter beside it."""

    def __init__(self, into: int, out: int, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(into, out)
        self.down = nn.Parameter(torch.randn(rank, into) / into)
        self.up = nn.Parameter(torch.zeros(out, rank))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base(inputs) + inputs @ self.down.T @ self.up.T


def adapted_net() -> nn.Module:
    return nn.Sequential(Adapted(5, 7), nn.GELU(), Adapted(7, 3)).double()


def adapters_later(model: nn.Module, stage: str, before: Optimizer | None) -> Optimizer:
    """The base, then the adapters: they are in the module from the beginning."""
    if stage == "third":
        assert before is not None
        return before
    adapters = [p for name, p in model.named_parameters() if "base" not in name]
    for name, p in model.named_parameters():
        p.requires_grad_(("base" in name) == (stage == "first"))
    bases = [p for name, p in model.named_parameters() if "base" in name]
    return momentum(bases if stage == "first" else adapters)


CASES = {
    "unfrozen": (unfrozen, net),
    "frozen again": (frozen_again, net),
    "another group": (another_group, net),
    "toggled": (toggled, net),
    "adapters later": (adapters_later, adapted_net),
}


@pytest.mark.parametrize("case", list(CASES))
def test_what_trains_changes_between_stages(case: str, tmp_path: Path) -> None:
    loop = make(*CASES[case])
    run, problem = assert_replayed(loop, tmp_path / "run")
    assert_modelled(loop, run, problem)


def test_what_joins_is_in_the_state_from_the_beginning(tmp_path: Path) -> None:
    run, _ = make(unfrozen).record(tmp_path / "run")
    start = parameters_of(seeded(0, net)())
    assert_bitwise(run.initial_state().params, start)
    assert run.manifest.frozen == ("0.bias", "0.weight")
    assert run.frozen_parameters() == {}
    assert run.tables.joined == {"0.weight": 4, "0.bias": 4}
    run.verify()


def test_what_never_trains_is_never_in_the_state(tmp_path: Path) -> None:
    def heads(model: nn.Module, stage: str, before: Optimizer | None) -> Optimizer:
        return before or momentum(model[2].parameters())

    run, _ = make(heads).record(tmp_path / "run")
    assert set(run.final_state()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert set(run.state(9).params) == {"2.weight", "2.bias"}


@pytest.mark.parametrize("until", [2, 5])
def test_a_run_is_resumed_before_and_after_a_parameter_joins(until: int, tmp_path: Path) -> None:
    whole = make(unfrozen).retrain()

    class StopError(Exception):
        pass

    def attempt(model: nn.Module, stop_at: int | None) -> None:
        optimizer = unfrozen(model, "first", None)
        problem = culpa.Problem(model, cross_entropy)
        with culpa.record(tmp_path / "run", problem, optimizer, resume=True) as recorder:
            for name, start, stop in STAGES:
                if start:
                    optimizer = unfrozen(model, name, optimizer)
                with recorder.stage(name, optimizer=optimizer):
                    for k, batch in enumerate(recorder.batches(BATCHES[start:stop]), start):
                        if k == stop_at:
                            raise StopError
                        optimizer.zero_grad()
                        cross_entropy(model, batch).backward()
                        optimizer.step()

    with pytest.raises(StopError):
        attempt(seeded(0, net)(), until)
    model = seeded(0, net)()
    attempt(model, None)
    assert_bitwise(parameters_of(model), parameters_of(whole))
    run = culpa.open_run(tmp_path / "run")
    run.verify(culpa.Problem(net(), cross_entropy), level="replay")


def test_a_frozen_parameter_that_was_edited_may_not_join(tmp_path: Path) -> None:
    def edits(model: nn.Module, stage: str, before: Optimizer | None) -> Optimizer:
        if stage == "second":
            model[0].weight.data.mul_(2.0)
        return unfrozen(model, stage, before)

    with pytest.raises(culpa.RecordError, match=r"params/0\.weight differs by up to"):
        make(edits).record(tmp_path / "run")


def test_a_group_added_inside_of_a_stage_is_refused(tmp_path: Path) -> None:
    model = net()
    optimizer = momentum(model[2].parameters())

    def attempt() -> None:
        with culpa.record(
            tmp_path / "run", culpa.Problem(model, cross_entropy), optimizer
        ) as recorder:
            for k, batch in enumerate(recorder.batches(BATCHES)):
                if k == 2:
                    optimizer.add_param_group({"params": list(model[0].parameters())})
                optimizer.zero_grad()
                cross_entropy(model, batch).backward()
                optimizer.step()

    with pytest.raises(culpa.RecordError, match=r"2 parameter groups are not those.*stage begins"):
        attempt()
    run = culpa.open_run(tmp_path / "run")
    assert (run.num_steps, run.manifest.status) == (2, "interrupted")
    run.verify(culpa.Problem(net(), cross_entropy), level="replay")


def test_adapters_merged_into_the_base_are_refused(tmp_path: Path) -> None:
    def merges(model: nn.Module, stage: str, before: Optimizer | None) -> Optimizer:
        if stage == "third":
            with torch.no_grad():
                for layer in (model[0], model[2]):
                    layer.base.weight += layer.up @ layer.down
        return adapters_later(model, stage, before)

    with pytest.raises(culpa.RecordError, match=r"before stage 'third'.*base\.weight differs"):
        make(merges, adapted_net).record(tmp_path / "run")


def test_averaged_copies_are_no_part_of_training(tmp_path: Path) -> None:
    averages = []

    def averaging(model: nn.Module, opened: Open) -> None:
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
        averages.append(average)
        optimizer = momentum(model.parameters())
        with opened(culpa.Problem(model, cross_entropy), optimizer) as driver:
            for name, start, stop in STAGES:
                with driver.stage(name):
                    for batch in driver.batches(BATCHES[start:stop]):
                        optimizer.zero_grad()
                        cross_entropy(model, batch).backward()
                        optimizer.step()
                        average.update_parameters(model)

    def problem(model: nn.Module) -> object:
        return culpa.Problem(model, cross_entropy)

    loop = Loop(seeded(0, net), averaging, problem, log_likelihoods, held_out())
    run, _ = assert_replayed(loop, tmp_path / "run")
    assert set(run.final_state()) == set(parameters_of(net()))
    assert not torch.equal(averages[0].module[0].weight, run.final_state()["0.weight"])
