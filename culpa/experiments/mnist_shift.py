"""Three jobs on digits turned by 0, 45 and 90 degrees, and which is credited on which test set."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import msgspec
import torch

from culpa.behaviour import Behaviour
from culpa.dynamics.propagator import Exact
from culpa.estimators.embed import embed
from culpa.experiments import measures, mnist
from culpa.experiments.data.digits import Digits
from culpa.experiments.frame import charts
from culpa.experiments.frame.experiment import Experiment, Setup
from culpa.experiments.frame.findings import Claim, Figure, Findings, Table
from culpa.experiments.frame.work import Part
from culpa.experiments.pipeline import RESTART, Job, train
from culpa.trajectory.replay import replay

STAGES = (("0°", 0.0, 3), ("45°", 45.0, 1), ("90°", 90.0, 1))
"""Name, rotation, epochs."""


class Options(msgspec.Struct, frozen=True):
    """``test``: images of each of the three test sets."""

    seeds: int = 5
    samples: int = 2_000
    batch: int = 100
    test: int = 500


def pipeline(options: Options, data: Digits, seed: int) -> list[Job]:
    """Each stage is a job of its own: its optimizer starts anew."""
    generator = torch.Generator().manual_seed(seed)
    jobs: list[Job] = []
    for name, degrees, epochs in STAGES:
        images = mnist.turned(data.images[: options.samples], degrees)
        labels = data.labels[: options.samples]
        some = [
            batch
            for _ in range(epochs)
            for batch in mnist.batches(images, labels, options.batch, generator)
        ]
        jobs.append(Job(name, some))
    return jobs


def test_sets(data: Digits, count: int) -> list[Behaviour]:
    """Log-likelihood on the first test images, turned by 0, 45 and 90 degrees."""
    labels = data.test_labels[:count]
    return [
        mnist.asked(f"test {name}", mnist.turned(data.test_images[:count], degrees), labels)
        for name, degrees, _ in STAGES
    ]


def examine(options: Options, data: Digits, seed: int, part: Part) -> dict[str, Any]:
    """Effects ``[test set][stage]``: the paper's score, the default estimate, and retraining."""
    model = mnist.network(seed)
    problem = train(part.folder("run"), model, pipeline(options, data, seed), mnist.COMMON)
    run, behaviours = part.opened("run"), test_sets(data, options.test)
    # Each job begins with a fresh optimizer, so a stage that is skipped is a stage restarted after.
    # A single update, of which the additive form is the sum, is not: its effect is that of a skip.
    paper = embed(run, problem, form="additive", propagator=Exact())
    ours = embed(run, problem, counterfactual="restart")
    without = [
        replay(run, problem, without=stage.name, counterfactual="restart") for stage in run.stages
    ]
    return {
        "accuracy": mnist.accuracy(model, data.test_images, data.test_labels),
        "score": [paper.score(b).mean(1).tolist() for b in behaviours],
        "effect": [ours.effect(b).mean(1).tolist() for b in behaviours],
        "truth": [[float(w.effect(b).mean()) for w in without] for b in behaviours],
    }


def run(setup: Setup) -> Findings:
    """All seeds."""
    options: Options = setup.options
    data, found = mnist.every_seed(setup, examine)
    names = [name for name, _, _ in STAGES]

    def cells(kind: str, test: int) -> list[str]:
        return [
            measures.spread([f[kind][test][stage] for f in found], 4, signed=True)
            for stage in range(len(STAGES))
        ]

    kinds = (("truth", "retrained"), ("effect", "culpa (default)"), ("score", "AA-Score (paper)"))
    table = Table(
        "Effect of each stage on each test set, nats",
        ("test set", "", *(f"stage {name}" for name in names)),
        tuple(
            (name if kind == "truth" else "", label, *cells(kind, test))
            for test, name in enumerate(names)
            for kind, label in kinds
        ),
        f"Mean log-likelihood of {options.test} test images; mean ± standard deviation over seeds.",
    )
    rows = [
        {
            "panel": f"test set {name}",
            "name": f"stage {names[stage]}",
            "value": fmean(f["score"][test][stage] for f in found),
            "truth": fmean(f["truth"][test][stage] for f in found),
            "marked": stage == test,
        }
        for test, name in enumerate(names)
        for stage in range(len(STAGES))
    ]
    figure = Figure(
        "stages",
        "The paper's Fig. 3c–e: the AA-Score of each stage on each test set, mean over seeds;"
        " orange the stage of the test set's own rotation; ticks: retraining without the stage.",
        charts.bars(
            rows,
            y="effect [nats]",
            panels=[f"test set {name}" for name in names],
            order=[f"stage {name}" for name in names],
        ),
    )
    return Findings(
        settings=(
            f"{mnist.SETTINGS} Three jobs on the first {min(options.samples, len(data.labels)):,}"
            f" images in batches of {options.batch}: three epochs at 0°, one at 45°, one at 90°."
            f" {RESTART}"
        ),
        claims=_claims(found),
        tables=(table,),
        figures=(figure,),
        stand_ins=(data.stand_in,) if data.stand_in else (),
        notes=(
            mnist.OPEN,
            "Accuracy on upright test images at the end of training: "
            + measures.spread([f["accuracy"] for f in found], 2)
            + ".",
        ),
    )


def _claims(found: list[Any]) -> tuple[Claim, ...]:
    total, names = len(found), [name for name, _, _ in STAGES]

    def leads(kind: str, test: int) -> int:
        return sum(max(range(3), key=f[kind][test].__getitem__) == test for f in found)

    counts = {kind: [leads(kind, t) for t in range(3)] for kind in ("score", "truth")}
    epochs = [count for _, _, count in STAGES]
    each = [
        [fmean(f["truth"][t][s] for f in found) / epochs[s] for s in range(3)] for t in range(3)
    ]
    pro_rata = [max(range(3), key=each[t].__getitem__) == t for t in range(3)]
    mean = {
        (test, stage): fmean(f["truth"][test][stage] for f in found)
        for test in range(3)
        for stage in range(3)
    }
    return (
        Claim(
            "Each stage leads on its own test set.",
            all(c == total for kind in counts.values() for c in kind),
            "It does on "
            + "; ".join(
                f"{names[t]} in {counts['truth'][t]} of {total} seeds by retraining"
                f" ({counts['score'][t]} by AA-Score)"
                for t in range(3)
            )
            + ".",
        ),
        Claim(
            "Each stage leads on its own test set, an epoch's effect against an epoch's.",
            all(pro_rata),
            "Stage 1 has three epochs, the others one. Retrained, divided by epochs: "
            + "; ".join(
                f"on {names[t]} " + ", ".join(f"{1e3 * v:+.2f}" for v in each[t]) for t in range(3)
            )
            + " thousandths of a nat.",
        ),
        Claim(
            "Training at 45° has moderate positive effects on both other test sets.",
            mean[0, 1] > 0 and mean[2, 1] > 0,
            f"Retrained: {mean[0, 1]:+.4f} on 0°, {mean[2, 1]:+.4f} on 90° nats (on its own"
            f" {mean[1, 1]:+.4f}).",
        ),
        Claim(
            "Training at 90° has minimal positive effect on the upright test set.",
            abs(mean[0, 2]) < 0.25 * mean[2, 2],
            f"Retrained: {mean[0, 2]:+.4f} nats, on its own test set {mean[2, 2]:+.4f}.",
        ),
    )


EXPERIMENT = Experiment(
    name="mnist-shift",
    title="Three jobs on turned digits",
    paper="Fig. 3c–e, §E.2.3, Table 1",
    must_show="the in-distribution stage leads on its own test set",
    scales={
        "paper": Options(),
        "small": Options(),
        "smoke": Options(seeds=1, samples=400, batch=50, test=100),
    },
    run=run,
)
