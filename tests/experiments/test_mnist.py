"""The MNIST experiments at their smallest: what is robust there, and truth by plain retraining."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import culpa
from culpa.experiments import mnist, mnist_insert, mnist_mislabel, mnist_optimizer, mnist_shift
from culpa.experiments.data.digits import bundled
from culpa.experiments.registry import experiment
from experiments.retraining import network, plan
from experiments.smoke import claim, part, smoke
from oracles.problems import log_likelihoods
from oracles.retrain import behaviour_values, retrain, true_effects

DATA = bundled()


def test_the_network_is_the_oracles() -> None:
    ours, theirs = mnist.network(3).state_dict(), network(3).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_insert(tmp_path: Path) -> None:
    result = smoke("mnist-insert", tmp_path)
    options = experiment("mnist-insert").scales["smoke"]
    found = part(tmp_path, "mnist-insert", "seed-0")
    assert claim(result, "The inserted update has the highest").holds
    assert "scikit-learn" in result.findings.stand_ins[0]
    # The paper's retraining of an inserted update: in the loop, its update skipped.
    written = plan(mnist_insert.pipeline(options, DATA, 0), 0)
    assert int(written.batches[options.at][1]) == 4
    assert all(int(b[1]) != 4 for k, b in enumerate(written.batches) if k != options.at)
    rows = mnist_insert.test_points(DATA, 0)[0][0]
    batch = (DATA.test_images[rows].flatten(1), DATA.test_labels[rows])
    truth = true_effects(written, [[options.at]], log_likelihoods, batch)
    assert found["truth"][0][0] == pytest.approx(float(truth.mean()), rel=1e-4)
    # The inserted image is the one it is tested on.
    assert torch.equal(batch[0], written.batches[options.at][0])
    assert found["scores"][0][options.at] == pytest.approx(found["truth"][0][0], rel=0.25)


def test_mislabel(tmp_path: Path) -> None:
    result = smoke("mnist-mislabel", tmp_path)
    options = experiment("mnist-mislabel").scales["smoke"]
    found = part(tmp_path, "mnist-mislabel", "seed-0")
    assert claim(result, "The 3 mislabelled batches").holds
    assert claim(result, "The more of them is").holds
    bad = range(options.at, options.at + options.bad)
    jobs, clean = (mnist_mislabel.pipeline(options, DATA, 0, share) for share in (1.0, 0.0))
    for k, (wrong, right) in enumerate(zip(jobs[0].batches, clean[0].batches, strict=True)):
        assert torch.equal(wrong[0], right[0])
        assert torch.equal(wrong[1], (right[1] + 1) % 10 if k in bad else right[1])
    test = slice(options.test)
    batch = (DATA.test_images[test].flatten(1), DATA.test_labels[test])
    truth = true_effects(plan(jobs, 0), [bad], log_likelihoods, batch)
    assert found["shares"]["1"][1] == pytest.approx(float(truth.mean()), rel=1e-3)


def test_shift(tmp_path: Path) -> None:
    result = smoke("mnist-shift", tmp_path)
    options = experiment("mnist-shift").scales["smoke"]
    found = part(tmp_path, "mnist-shift", "seed-0")
    assert claim(result, "Training at 45° has").holds
    jobs = mnist_shift.pipeline(options, DATA, 0)
    written = plan(jobs, 0)
    assert list(written.optimizers) == [0, 24, 32]
    # The paper's retraining of a stage: the pipeline without it, later jobs with fresh optimizers.
    for test, (_, degrees, _) in enumerate(mnist_shift.STAGES):
        images = mnist.turned(DATA.test_images[: options.test], degrees).flatten(1)
        batch = (images, DATA.test_labels[: options.test])
        removals = [written.updates(job.name) for job in jobs]
        truth = true_effects(written, removals, log_likelihoods, batch, "restart").mean(1)
        assert found["truth"][test] == pytest.approx(truth.tolist(), rel=1e-3, abs=1e-7)
        most = float(truth.abs().max())
        assert found["effect"][test] == pytest.approx(truth.tolist(), abs=0.1 * most)
    # Its run replays with the problem that the command line can name.
    run = culpa.open_run(tmp_path / "smoke" / "mnist-shift" / "runs" / "seed-0" / "run")
    problem, behaviours = mnist.problem()
    assert run.verify(problem, level="replay").executed == run.num_steps
    assert culpa.replay(run, problem, without="90°").effect(behaviours[0]).shape == (1400,)


def test_optimizer(tmp_path: Path) -> None:
    result = smoke("mnist-optimizer", tmp_path)
    options = experiment("mnist-optimizer").scales["smoke"]
    found = part(tmp_path, "mnist-optimizer", "seed-0")
    assert claim(result, "A lower learning rate").holds
    assert claim(result, "Lower momentum").holds
    test = slice(options.test)
    batch = (DATA.test_images[test].flatten(1), DATA.test_labels[test])
    for name, change in mnist_optimizer.CHANGES.items():
        written = plan(mnist_optimizer.pipeline(options, DATA, 0, change), 0)
        if "lr" in change:
            rates = [(change["lr"] if k >= options.at else 1e-3,) for k in range(written.num_steps)]
            written.rates[:] = rates  # type: ignore[index]
        models = [retrain(written, s).model for s in ((), written.updates("stage 2"))]
        whole, without = (behaviour_values(m, log_likelihoods, batch).mean() for m in models)
        assert found[name]["truth"] == pytest.approx(float(whole - without), rel=1e-3)
