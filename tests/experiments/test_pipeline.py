"""Estimates and retraining of a pipeline of jobs, against a plain loop that knows no culpa."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import culpa
from culpa.experiments import confounder, measures, pipeline
from culpa.experiments.pipeline import ADDITIVE, BLOCK, DVEMB, EFFECT, SGD, Job

RATE, MOMENTUM, DECAY = 0.05, 0.9, 1e-3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def batches(seed: int, count: int = 4) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    some = [torch.randn(5, 6, generator=draw) + seed for _ in range(count)]
    return [(x, torch.randint(0, 3, (5,), generator=draw)) for x in some]


JOBS = [Job(f"job {i}", batches(i)) for i in range(3)]
TEST = (torch.randn(20, 6, generator=torch.Generator().manual_seed(9)), torch.arange(20) % 3)


def plainly(jobs: list[list[tuple[Tensor, Tensor]]]) -> Tensor:
    """Log-likelihoods after training on the jobs, each with a fresh optimizer."""
    model = network()
    for job in jobs:
        optimizer = torch.optim.SGD(
            model.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY
        )
        for x, y in job:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    with torch.no_grad():
        return -cross_entropy(model(TEST[0]), TEST[1], reduction="none")


def recorded(folder: Path, fresh: bool) -> tuple[culpa.Run, culpa.Problem]:
    sgd = SGD(RATE, MOMENTUM, DECAY)
    problem = pipeline.train(folder / "run", network(), JOBS, sgd, fresh=fresh)
    return culpa.open_run(folder / "run"), problem


def test_retrained_effects_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    run, problem = recorded(tmp_path, True)
    behaviour = culpa.log_likelihood("test", TEST)
    found = pipeline.correlations(run, problem, [behaviour])
    plain = [list(job.batches) for job in JOBS]
    whole = plainly(plain)
    truth = [whole - plainly([j for k, j in enumerate(plain) if k != i]) for i in range(3)]
    means = found["means"]["retrained"][0]
    assert means == pytest.approx([float(t.mean()) for t in truth], rel=1e-4)
    assert set(found["pearson"]) == {DVEMB, ADDITIVE, BLOCK, EFFECT}
    for method, form, meaning in ((ADDITIVE, "additive", "skip"), (BLOCK, "block", "restart")):
        embeddings = culpa.embed(
            run, problem, form=form, propagator=culpa.Exact(), counterfactual=meaning
        )
        estimate = embeddings.score(behaviour)
        wanted = [measures.pearson(estimate[i], truth[i]) for i in range(3)]
        assert found["pearson"][method][0] == pytest.approx(wanted, abs=1e-4)
    assert min(found["pearson"][EFFECT][0]) > 0.99
    assert found["pearson"][EFFECT][0][2] == pytest.approx(1, abs=1e-5)


def test_two_stages_are_estimated_too(tmp_path: Path) -> None:
    problem = pipeline.train(tmp_path / "run", network(), JOBS[:2], SGD(RATE, MOMENTUM, DECAY))
    run = culpa.open_run(tmp_path / "run")
    test = [culpa.log_likelihood("test", TEST)]
    found = pipeline.correlations(run, problem, test, [EFFECT])
    (estimated,), (retrained,) = found["means"][EFFECT], found["means"]["retrained"]
    assert estimated == pytest.approx(retrained, rel=0.05)
    assert estimated[0] != retrained[0], "estimated, not replayed"


def test_single_updates_are_skipped_one_by_one(tmp_path: Path) -> None:
    run, problem = recorded(tmp_path, True)
    behaviour = culpa.log_likelihood("test", TEST)
    found = pipeline.one_by_one(run, problem, [behaviour])
    plain = [list(job.batches) for job in JOBS]
    whole = plainly(plain)
    additive = culpa.embed(run, problem, form="additive", propagator=culpa.Exact())
    for at in range(3):
        without = [[b for k, b in enumerate(plain[at]) if k != k_out] for k_out in range(4)]
        single = [whole - plainly([*plain[:at], less, *plain[at + 1 :]]) for less in without]
        stage = whole - plainly([*plain[:at], *plain[at + 1 :]])
        total = torch.stack(single).sum(0)
        score = measures.pearson(additive.score(behaviour)[at], total)
        assert found["score"][0][at] == pytest.approx(score, abs=1e-4)
        assert found["stage"][0][at] == pytest.approx(measures.pearson(total, stage), abs=1e-4)


def test_the_stages_removed_are_the_confounders_extremes(tmp_path: Path) -> None:
    run, problem = recorded(tmp_path, False)
    swapped = culpa.log_likelihood("confounder", (TEST[0], (TEST[1] + 1) % 3))
    both = [culpa.log_likelihood("task", TEST), swapped]
    found = confounder.removed(run, problem, both, top=1, bottom=1)
    scores = culpa.attribute(run, problem, both).stages
    assert found["top"]["stages"] == [int(scores[:, 1].argmax())]
    assert found["bottom"]["stages"] == [int(scores[:, 1].argmin())]
    for name in ("top", "bottom"):
        (at,) = found[name]["stages"]
        truth = culpa.replay(run, problem, without=f"job {at}")
        assert found[name]["change"][1] == pytest.approx(-float(truth.effect(swapped).mean()))
        assert found[name]["predicted"] == pytest.approx((-scores[at]).tolist())
    lowers, raises, agrees = confounder.claims([found], 1, 1)
    assert lowers.holds == (found["top"]["change"][1] < 0)
    assert raises.holds == (found["bottom"]["change"][1] > 0)
    same = [found[n]["change"][1] * found[n]["predicted"][1] > 0 for n in ("top", "bottom")]
    assert agrees.holds == all(same)


def test_auc() -> None:
    marked = torch.tensor([True, False, True, False])
    assert measures.auc(torch.tensor([3.0, 1.0, 2.0, 0.0]), marked) == 1.0
    assert measures.auc(torch.tensor([0.0, 1.0, 2.0, 2.0]), marked) == 0.375
