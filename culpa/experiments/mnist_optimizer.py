"""The optimizer changed at update 30, and what becomes of the credit of the updates after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

CHANGES: dict[str, dict[str, float]] = {
    "nothing changed": {},
    "learning rate .0001": {"lr": 1e-4},
    "momentum .1": {"momentum": 0.1},
    "weight decay .1": {"weight_decay": 0.1},
}
"""Fig. 3f to 3i: what stage 2 changes of lr .001, momentum .9, weight decay 1e-5."""
BASE, RATE, MOMENTUM, DECAY = CHANGES


class Options(msgspec.Struct, frozen=True):
    """``at``: the first update of stage 2."""

    seeds: int = 5
    samples: int = 10_000
    batch: int = 100
    at: int = 30
    test: int = 1_000


def pipeline(options: Options, data: Digits, seed: int, change: dict[str, float]) -> list[Job]:
    """One epoch, cut into two stages of one job."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = data.images[: options.samples], data.labels[: options.samples]
    every = mnist.batches(images, labels, options.batch, generator)
    before, after = every[: options.at], every[options.at :]
    return [Job("stage 1", before), Job("stage 2", after, fresh=False, change=change)]


def examine(options: Options, data: Digits, seed: int, part: Part) -> dict[str, Any]:
    """For each change the scores of every update, and what stage 2 did by retraining."""
    behaviour = mnist.asked(
        "log-likelihood", data.test_images[: options.test], data.test_labels[: options.test]
    )
    found: dict[str, Any] = {}
    for name, change in CHANGES.items():
        model, folder = mnist.network(seed), name.replace(" ", "-")
        problem = train(
            part.folder(folder), model, pipeline(options, data, seed, change), mnist.COMMON
        )
        run = part.opened(folder)
        truth = replay(run, problem, without="stage 2").effect(behaviour)
        scores = attribute(run, problem, [behaviour])
        found[name] = {"scores": scores.steps[:, 0].tolist(), "truth": float(truth.mean())}
    return found


def run(setup: Setup) -> Findings:
    """All seeds; the figure is of the first."""
    options: Options = setup.options
    data, found = mnist.every_seed(setup, examine)
    score = {n: [sum(f[n]["scores"][options.at :]) for f in found] for n in CHANGES}
    truth = {n: [f[n]["truth"] for f in found] for n in CHANGES}
    table = Table(
        f"Stage 2 (from update {options.at}) under each change, nats",
        ("changed in stage 2", "AA-Score of stage 2", "of the unchanged", "retrained"),
        tuple(
            (
                name,
                measures.spread(score[name], 4, signed=True),
                f"{fmean(score[name]) / fmean(score[BASE]):.0%}",
                measures.spread(truth[name], 4, signed=True),
            )
            for name in CHANGES
        ),
        f"Effect on the log-likelihood of {options.test} test images; mean ± standard deviation"
        " over seeds.",
    )
    rows = [
        {"panel": name, "x": k, "value": value, "marked": k >= options.at}
        for name in CHANGES
        for k, value in enumerate(found[0][name]["scores"])
    ]
    spec = charts.strips(rows, x="update", y="AA-Score [nats]", panel="panel", panels=list(CHANGES))
    spec["resolve"] = {"scale": {"y": "shared"}}
    figure = Figure(
        "updates",
        "The paper's Fig. 3f–i: the AA-Score of every update (seed 0); orange: stage 2, with the"
        " change named.",
        spec,
    )
    return Findings(
        settings=(
            f"{mnist.SETTINGS} The first {min(options.samples, len(data.labels)):,} images, one"
            f" epoch in batches of {options.batch}; at update {options.at} the loop changes one"
            " hyperparameter."
        ),
        claims=_claims(score, truth),
        tables=(table,),
        figures=(figure,),
        stand_ins=(data.stand_in,) if data.stand_in else (),
        notes=(
            "The paper does not say how long these runs are; here they are those of"
            " `mnist-mislabel`, with every label right.",
        ),
    )


def _claims(
    score: Mapping[str, Sequence[float]], truth: Mapping[str, Sequence[float]]
) -> tuple[Claim, ...]:
    def claim(text: str, lower: str, higher: str) -> Claim:
        total = len(score[lower])
        counts = [
            sum(a < b for a, b in zip(side[lower], side[higher], strict=True))
            for side in (score, truth)
        ]
        return Claim(
            text,
            counts == [total, total],
            f"By AA-Score in {measures.of(counts[0], total)}"
            f" ({fmean(score[lower]):+.4f} against {fmean(score[higher]):+.4f} nats), by retraining"
            f" in {counts[1]} ({fmean(truth[lower]):+.4f} against {fmean(truth[higher]):+.4f}).",
        )

    return (
        claim("A lower learning rate lowers stage 2's score.", RATE, BASE),
        claim("Lower momentum lowers it.", MOMENTUM, BASE),
        claim("Higher weight decay lowers it.", DECAY, BASE),
        claim("Weight decay does so less than the learning rate.", RATE, DECAY),
        claim("Weight decay does so less than momentum.", MOMENTUM, DECAY),
    )


EXPERIMENT = Experiment(
    name="mnist-optimizer",
    title="The optimizer changed in the middle of training",
    paper="Fig. 3f–i",
    must_show="lower learning rate and momentum lower the later updates' scores, weight decay less",
    scales={
        "paper": Options(),
        "small": Options(),
        "smoke": Options(seeds=1, samples=1_000, batch=50, at=8, test=200),
    },
    run=run,
)
