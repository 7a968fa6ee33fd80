"""Five mislabelled batches in an epoch of MNIST: they should get the blame."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import msgspec
import torch

from culpa.estimators.adjoint import attribute
from culpa.experiments import measures, mnist
from culpa.experiments.data.digits import Digits
from culpa.experiments.frame import charts
from culpa.experiments.frame.experiment import Experiment, Setup
from culpa.experiments.frame.findings import Claim, Figure, Findings, Table
from culpa.experiments.frame.work import Part
from culpa.experiments.pipeline import Job, train
from culpa.trajectory.replay import replay


class Options(msgspec.Struct, frozen=True):
    """``shares``: of each bad batch, so much is mislabelled; the first is the paper's setting.

    ``truth``: whether every update is skipped and retrained, in the paper's setting.
    """

    seeds: int = 5
    samples: int = 10_000
    batch: int = 100
    at: int = 30
    bad: int = 5
    test: int = 1_000
    shares: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    truth: bool = True


def pipeline(options: Options, data: Digits, seed: int, share: float = 1.0) -> list[Job]:
    """One epoch; in the bad batches ``share`` of the labels are shifted from d to d + 1."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = data.images[: options.samples], data.labels[: options.samples]
    plain = mnist.batches(images, labels, options.batch, generator)
    for k in range(options.at, options.at + options.bad):
        inputs, right = plain[k]
        wrong, count = right.clone(), round(share * len(right))
        wrong[:count] = (right[:count] + 1) % 10
        plain[k] = inputs, wrong
    return [Job("training", plain)]


def examine(options: Options, data: Digits, seed: int, part: Part) -> dict[str, Any]:
    """The score and the true effect of every update; of the bad ones together for every share."""
    bad = range(options.at, options.at + options.bad)
    behaviour = mnist.asked(
        "log-likelihood", data.test_images[: options.test], data.test_labels[: options.test]
    )
    rows: dict[str, Any] = {"shares": {}}
    for share in options.shares:
        model, name = mnist.network(seed), f"share-{share:g}"
        problem = train(
            part.folder(name), model, pipeline(options, data, seed, share), mnist.COMMON
        )
        run = part.opened(name)
        steps = attribute(run, problem, [behaviour]).steps[:, 0]
        together = float(replay(run, problem, without=bad).effect(behaviour).mean())
        rows["shares"][f"{share:g}"] = [float(steps[list(bad)].sum()), together]
        if share == options.shares[0]:
            rows["scores"] = steps.tolist()
            if options.truth:
                rows["truth"] = [
                    float(replay(run, problem, without=[k]).effect(behaviour).mean())
                    for k in range(run.num_steps)
                ]
    return rows


def run(setup: Setup) -> Findings:
    """All seeds; the figure is of the first."""
    options: Options = setup.options
    data, found = mnist.every_seed(setup, examine)
    bad = range(options.at, options.at + options.bad)
    shares = [f"{share:g}" for share in options.shares]
    table = Table(
        f"The {options.bad} bad batches together, by how much of them is mislabelled, nats",
        ("mislabelled", "AA-Score (sum)", "retrained without them"),
        tuple(
            (
                f"{float(s):.0%}",
                measures.spread([f["shares"][s][0] for f in found], 4, signed=True),
                measures.spread([f["shares"][s][1] for f in found], 4, signed=True),
            )
            for s in shares
        ),
        f"Effect on the log-likelihood of {options.test} test images, mean ± standard deviation"
        " over seeds.",
    )
    rows = [
        {"panel": "log-likelihood of test images", "x": k, "value": value, "marked": k in bad}
        | ({"truth": found[0]["truth"][k]} if options.truth else {})
        for k, value in enumerate(found[0]["scores"])
    ]
    figure = Figure(
        "updates",
        "The paper's Fig. 3b: the effect of every update (seed 0). Bars: AA-Score, orange the"
        " mislabelled batches; points: retraining without the update.",
        charts.strips(
            rows,
            x="update",
            y="effect [nats]",
            panel="panel",
            panels=["log-likelihood of test images"],
            columns=1,
        ),
    )
    return Findings(
        settings=(
            f"{mnist.SETTINGS} The first {min(options.samples, len(data.labels)):,} images, one"
            f" epoch in batches of {options.batch}; from batch {options.at} on {options.bad}"
            " batches have the label of every digit d shifted to d + 1. The paper's retraining:"
            " updates skipped inside of the run."
        ),
        claims=_claims(options, found, shares),
        tables=(table,),
        figures=(figure,),
        stand_ins=(data.stand_in,) if data.stand_in else (),
        notes=(
            mnist.OPEN,
            'The paper\'s "degree of label shift" is taken as the share of a bad batch whose labels'
            " are shifted.",
        ),
    )


def _claims(options: Options, found: list[Any], shares: list[str]) -> tuple[Claim, ...]:
    bad = set(range(options.at, options.at + options.bad))
    total = len(found)

    def lowest(values: list[float]) -> bool:
        order = sorted(range(len(values)), key=lambda k: values[k])
        return set(order[: options.bad]) == bad

    right = sum(lowest(f["scores"]) for f in found)
    words = f"By AA-Score in {measures.of(right, total)}"
    if options.truth:
        words += f", by retraining in {sum(lowest(f['truth']) for f in found)} of {total}"
        every = [
            measures.pearson(torch.tensor(f["scores"]), torch.tensor(f["truth"])) for f in found
        ]
        words += f"; correlation of the two over all updates {measures.spread(every)}"
    sizes = [fmean(f["shares"][s][0] for f in found) for s in shares]
    truths = [fmean(f["shares"][s][1] for f in found) for s in shares]
    return (
        Claim(
            f"The {options.bad} mislabelled batches are the most negative.",
            right == total,
            words + ".",
        ),
        Claim(
            "The more of them is mislabelled, the lower their effect.",
            sizes == sorted(sizes) and truths == sorted(truths),
            "AA-Scores "
            + ", ".join(f"{float(s):.0%}: {v:+.4f}" for s, v in zip(shares, sizes, strict=True))
            + "; retrained "
            + ", ".join(f"{v:+.4f}" for v in truths)
            + ".",
        ),
    )


EXPERIMENT = Experiment(
    name="mnist-mislabel",
    title="Five mislabelled batches",
    paper="Fig. 3b, §E.2.2",
    must_show="the five mislabelled batches are the most negative",
    scales={
        "paper": Options(),
        "small": Options(),
        "smoke": Options(
            seeds=1, samples=1_000, batch=50, at=8, bad=3, test=200, shares=(1.0, 0.5), truth=False
        ),
    },
    run=run,
)
