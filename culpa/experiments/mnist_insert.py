"""One '4' in a training without 4s: its update should get the credit for recognising 4s."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import msgspec
import torch
from torch import Tensor

from culpa.estimators.adjoint import attribute
from culpa.experiments import measures, mnist
from culpa.experiments.data.digits import Digits
from culpa.experiments.frame import charts
from culpa.experiments.frame.experiment import Experiment, Setup
from culpa.experiments.frame.findings import Claim, Figure, Findings, Table
from culpa.experiments.frame.work import Part
from culpa.experiments.pipeline import Job, train
from culpa.trajectory.replay import replay

DIGIT, LIKE, UNLIKE = 4, 9, 2
ASKED = ("the same 4", "another 4", "a 9", "a 2")
CLASSES = ("all other 4s", "all 9s", "all 2s")


class Options(msgspec.Struct, frozen=True):
    """``truth``: whether every update is skipped and retrained, or the inserted one only."""

    seeds: int = 5
    samples: int = 100
    at: int = 30
    truth: bool = True


def pipeline(options: Options, data: Digits, seed: int) -> list[Job]:
    """One job of single images: none shows a 4 but that of update ``options.at``."""
    generator = torch.Generator().manual_seed(seed)
    others = torch.nonzero(data.labels != DIGIT).flatten()[: options.samples]
    plain = mnist.batches(data.images[others], data.labels[others], 1, generator)
    own = chosen(data, DIGIT, seed)
    image = data.test_images[own : own + 1].flatten(1)
    inserted = (image, data.test_labels[own : own + 1])
    return [Job("training", [*plain[: options.at], inserted, *plain[options.at :]])]


def chosen(data: Digits, digit: int, number: int) -> int:
    """The row of the test set that shows ``digit`` for the ``number``-th time, counted round."""
    rows = torch.nonzero(data.test_labels == digit).flatten()
    return int(rows[number % len(rows)])


def test_points(data: Digits, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Rows of the test set: the four single images, then the three whole classes."""
    own = chosen(data, DIGIT, seed)
    single = [own, chosen(data, DIGIT, seed + 100), chosen(data, LIKE, seed)]
    single.append(chosen(data, UNLIKE, seed))
    whole = [torch.nonzero(data.test_labels == d).flatten() for d in (DIGIT, LIKE, UNLIKE)]
    whole[0] = whole[0][whole[0] != own]
    return [torch.tensor([row]) for row in single], whole


def examine(options: Options, data: Digits, seed: int, part: Part) -> dict[str, Any]:
    """Scores of every update for single images and classes, and what retraining says."""
    model = mnist.network(seed)
    problem = train(part.folder("run"), model, pipeline(options, data, seed), mnist.COMMON)
    run = part.opened("run")
    single, whole = test_points(data, seed)
    behaviours = [
        mnist.asked(name, data.test_images[rows], data.test_labels[rows])
        for name, rows in zip((*ASKED, *CLASSES), (*single, *whole), strict=True)
    ]
    scores = attribute(run, problem, behaviours)
    skipped = range(run.num_steps) if options.truth else [options.at]
    truth: list[list[float]] = []
    for k in skipped:
        without = replay(run, problem, without=[k])
        truth.append([float(without.effect(b).mean()) for b in behaviours])
    return {
        "scores": scores.steps.T.tolist(),
        "truth": [list(column) for column in zip(*truth, strict=True)],
        "skipped": list(skipped),
    }


def run(setup: Setup) -> Findings:
    """All seeds; the figure is of the first."""
    options: Options = setup.options
    data, found = mnist.every_seed(setup, examine)
    names = (*ASKED, *CLASSES)
    at = found[0]["skipped"].index(options.at)
    estimated = {n: [f["scores"][q][options.at] for f in found] for q, n in enumerate(names)}
    true = {n: [f["truth"][q][at] for f in found] for q, n in enumerate(names)}
    ranks = {n: [_rank(f["scores"][q], options.at) for f in found] for q, n in enumerate(names)}
    rows = [
        (
            name,
            measures.spread(estimated[name], 4, signed=True),
            measures.spread(true[name], 4, signed=True),
            ", ".join(str(r) for r in ranks[name]),
            _agreement(found, q) if options.truth else "",
        )
        for q, name in enumerate(names)
    ]
    table = Table(
        f"The effect of the inserted 4 (update {options.at}), nats",
        (
            "tested on",
            "AA-Score",
            "retrained",
            "its rank by seed",
            "all updates: r with retraining",
        ),
        tuple(rows),
        "Mean ± standard deviation over seeds. Rank 1: the highest score of all"
        f" {len(found[0]['scores'][0])} updates. Whole classes are of the test set.",
    )
    figure_rows = [
        {"panel": name, "x": k, "value": value, "marked": k == options.at}
        | ({"truth": found[0]["truth"][q][k]} if options.truth else {})
        for q, name in enumerate(ASKED)
        for k, value in enumerate(found[0]["scores"][q])
    ]
    figure = Figure(
        "updates",
        "The paper's Fig. 5: the effect of every update on four test images (seed 0). Bars:"
        " AA-Score, orange the inserted 4; points: retraining without the update.",
        charts.strips(figure_rows, x="update", y="effect [nats]", panel="panel", panels=ASKED),
    )
    return Findings(
        settings=(
            f"{mnist.SETTINGS} The first {options.samples} images that are no 4, one an update, in"
            f" random order; at update {options.at} a 4 of the test set. The paper's retraining:"
            " the update skipped inside of the run."
        ),
        claims=_claims(estimated, true, ranks),
        tables=(table,),
        figures=(figure,),
        stand_ins=(data.stand_in,) if data.stand_in else (),
        notes=(mnist.OPEN,),
    )


def _rank(scores: list[float], at: int) -> int:
    return 1 + sum(score > scores[at] for score in scores)


def _agreement(found: list[Any], q: int) -> str:
    every = [
        measures.pearson(torch.tensor(f["scores"][q]), torch.tensor(f["truth"][q])) for f in found
    ]
    return measures.spread(every)


def _claims(
    estimated: dict[str, list[float]], true: dict[str, list[float]], ranks: dict[str, list[int]]
) -> tuple[Claim, ...]:
    total = len(ranks["a 9"])
    first = [sum(r == 1 for r in ranks[name]) for name in ASKED[:2]]
    nine = {k: fmean(v["all 9s"]) for k, v in (("score", estimated), ("true", true))}
    four, two = fmean(true["all other 4s"]), fmean(true["all 2s"])
    lowered = [sum(value < 0 for value in side["a 9"]) for side in (estimated, true)]
    return (
        Claim(
            "The inserted update has the highest effect of all on both 4s.",
            first == [total, total],
            f"On the same 4 in {measures.of(first[0], total)}, on another 4 in"
            f" {measures.of(first[1], total)}.",
        ),
        Claim(
            "It is slightly negative on a 9.",
            nine["score"] < 0 and nine["true"] < 0,
            f"On single 9s negative in {measures.of(lowered[0], total)} (retrained:"
            f" {lowered[1]}); the mean over all 9s of the test set is {nine['score']:+.4f} nats,"
            f" retrained {nine['true']:+.4f}.",
        ),
        Claim(
            "It is near zero on a 2: smaller in size than on 4s and on 9s.",
            abs(two) < abs(nine["true"]) and abs(two) < abs(four),
            f"Retrained, means over the classes: 2s {two:+.4f}, 9s {nine['true']:+.4f}, other 4s"
            f" {four:+.4f} nats.",
        ),
    )


EXPERIMENT = Experiment(
    name="mnist-insert",
    title="One 4 inserted into a training without 4s",
    paper="Fig. 3a, Fig. 5, §E.2.1",
    must_show=(
        "the inserted step has the highest effect on both 4s; slightly negative on 9; near zero on"
        " 2"
    ),
    scales={
        "paper": Options(),
        "small": Options(),
        "smoke": Options(seeds=1, samples=40, at=12, truth=False),
    },
    run=run,
)
