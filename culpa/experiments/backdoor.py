"""A BadNets backdoor on CIFAR-10, in few batches or in every one, and what finds the poison.

Behaviours: the log-likelihood of the attacker's label on test images with the square (what the
attacker wants), that of their true labels, and by how much the square raises the former.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import msgspec
import torch
from torch import Tensor, nn

from culpa.behaviour import Behaviour
from culpa.dynamics.identity import Identity
from culpa.estimators.adjoint import attribute
from culpa.experiments import backdoor_page, badnets, measures
from culpa.experiments.alignment import alignments, by_example
from culpa.experiments.backdoor_page import ADDED, ALIGNED, LABEL, LABELLED, SUM, TRUE
from culpa.experiments.badnets import TARGET
from culpa.experiments.data.cifar10 import Cifar10, cifar10
from culpa.experiments.data.folder import DataFolder
from culpa.experiments.frame.experiment import Experiment, Setup
from culpa.experiments.frame.findings import Findings
from culpa.experiments.frame.work import Part
from culpa.experiments.pipeline import SGD, Job, right_share, train
from culpa.experiments.resnet import pretrained, resnet
from culpa.problem import Problem
from culpa.trajectory.replay import replay
from culpa.trajectory.run import Run

FEW, SPREAD = "few batches", "every batch"
SETTINGS = (FEW, SPREAD)


class Course(msgspec.Struct, frozen=True):
    """So many ``epochs`` of ``batches`` of ``batch`` images."""

    batch: int
    batches: int
    epochs: int
    lr: float


class Options(msgspec.Struct, frozen=True):
    """``network``: with ``pretrained`` weights or random ones, its first layer ``width`` wide.

    ``few``, ``spread``: the training of either setting. ``bad``: poisoned
    batches of an epoch, in which all is poisoned; ``share``: of all examples, where the poison is
    in every batch. ``square``: its side. ``truth``: so many updates, half of them poisoned, are
    skipped and retrained. ``synthetic``: images of no meaning, for the tests.
    """

    seeds: int = 3
    network: str = "resnet20"
    pretrained: bool = True
    width: int | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    few: Course = Course(16, 60, 1, 0.001)
    spread: Course = Course(32, 30, 4, 0.01)
    bad: int = 12
    share: float = 0.1
    square: int = 8
    test: int = 200
    truth: int = 4
    synthetic: bool = False

    def course(self, setting: str) -> Course:
        """The training of a setting."""
        return self.few if setting == FEW else self.spread


def model_of(options: Options, seed: int, data: DataFolder) -> nn.Module:
    """The network before this training."""
    if options.pretrained:
        return pretrained(options.network, 10, seed, data)
    return resnet(options.network, 10, seed, options.width)


def images_of(options: Options, folder: DataFolder, images: int) -> Cifar10:
    """CIFAR-10, as much of it as is needed."""
    counts = 2 * images, 2 * options.test
    if options.synthetic:
        return badnets.meaningless(*counts)
    return cifar10(folder, train=counts[0], test=counts[1])


def examine(options: Options, folder: DataFolder, seed: int, setting: str, part: Part) -> Any:
    """One run: scores of its updates, or of its examples, and which of them are poisoned."""
    course, generator = options.course(setting), torch.Generator().manual_seed(seed)
    data = images_of(options, folder, course.batch * course.batches)
    places = [places_of(options, setting, generator) for _ in range(course.epochs)]
    images, labels = badnets.poisoned(
        data, places[0].numel(), int(places[0].sum()), options.square, generator
    )
    rows = torch.cat([badnets.arranged(some, generator) for some in places])
    model = model_of(options, seed, folder)
    behaviours = badnets.asked(data, options.test, options.square)
    job = Job("training", [(images[some], labels[some]) for some in rows])
    optimizer = SGD(course.lr, options.momentum, options.weight_decay)
    problem = train(part.folder("run"), model, [job], optimizer)
    run = part.opened("run")
    (squared, target), (plain, _) = behaviours[ADDED].batch
    found = {
        "attack": right_share(model, (squared, target)),
        "accuracy": right_share(model, (plain, behaviours[TRUE].batch[1])),
    }
    if setting == SPREAD:
        ids = torch.tensor([i for k in range(run.num_steps) for i in run.example_ids(k)])
        bad, labelled = (torch.zeros(int(ids.max()) + 1, dtype=torch.bool) for _ in range(2))
        bad[ids[torch.cat(places).flatten()]] = True
        labelled[ids[labels[rows.flatten()] == TARGET]] = True
        return found | {"auc": _examples(run, problem, behaviours[ADDED], bad, labelled)}
    return found | _updates(options, run, problem, behaviours, torch.cat(places).all(1), generator)


def _examples(
    run: Run, problem: Problem, behaviour: Behaviour, bad: Tensor, labelled: Tensor
) -> dict[str, float]:
    """AUC of two scores, among all examples and among those with the attacker's label."""
    sums = attribute(run, problem, [behaviour], propagator=Identity(), examples=True)
    scores = {
        SUM: cast("Tensor", sums.examples)[:, 0],
        ALIGNED: by_example(run, alignments(run, problem, behaviour)),
    }
    return {
        name + suffix: measures.auc(values[among], bad[among])
        for name, values in scores.items()
        for suffix, among in (("", slice(None)), (LABELLED, labelled))
    }


def _updates(
    options: Options,
    run: Run,
    problem: Problem,
    behaviours: list[Behaviour],
    bad: Tensor,
    generator: torch.Generator,
) -> dict[str, Any]:
    """AA-Scores of the updates for both labels and their examples' mean alignment; some truth."""
    judged = _judged(options, bad, generator)
    wanted, visits = behaviours[LABEL], alignments(run, problem, behaviours[ADDED])
    effects = attribute(run, problem, behaviours[:ADDED]).steps.T.tolist()
    return {
        "scores": [*effects, [float(examples.mean()) for examples in visits]],
        "bad": bad.nonzero().flatten().tolist(),
        "judged": judged,
        "truth": [float(replay(run, problem, without=[k]).effect(wanted).mean()) for k in judged],
    }


def places_of(options: Options, setting: str, generator: torch.Generator) -> Tensor:
    """Where in an epoch the poison is, bool ``[batches, batch]``."""
    if setting == FEW:
        return badnets.few(options.few.batches, options.few.batch, options.bad, generator)
    return badnets.every(options.spread.batches, options.spread.batch, options.share)


def _judged(options: Options, bad: Tensor, generator: torch.Generator) -> list[int]:
    """Updates to be skipped for comparison: half of them poisoned ones, where there are such."""
    chosen: list[int] = []
    for members in (bad.nonzero().flatten(), (~bad).nonzero().flatten()):
        order = torch.randperm(len(members), generator=generator)[: options.truth // 2]
        chosen += members[order].tolist()
    return sorted(chosen)


def run(setup: Setup) -> Findings:
    """Both settings, all seeds; the figures are of the first."""
    options: Options = setup.options
    if setup.scale == "paper":
        cifar10(setup.data, train=1, test=1, required=True)
    setup.work.plan(2 * len(setup.seeds))
    found: dict[str, list[Any]] = {
        setting: [
            setup.work.part(
                f"{setting.replace(' ', '-')}-{seed}",
                {"seed": seed, "setting": setting},
                partial(examine, options, setup.data, seed, setting),
            )
            for seed in setup.seeds
        ]
        for setting in SETTINGS
    }
    few, spread = found[FEW], found[SPREAD]
    return Findings(
        settings=(
            f"{options.network}{' with pretrained weights' * options.pretrained}, SGD with momentum"
            f" {options.momentum:g}, weight decay {options.weight_decay:g}. BadNets: a white square"
            f" of {options.square} x {options.square} in a corner and the label 0. Either"
            f" {options.bad} batches of an epoch are all poison"
            f" ({_words(options.few)}), or {options.share:.1%} of every batch is"
            f" ({_words(options.spread)}). Tested on {options.test} images of other labels."
        ),
        claims=backdoor_page.claims(few, spread),
        tables=(backdoor_page.table(few, spread),),
        figures=(backdoor_page.figure(few[0]),),
        stand_ins=() if setup.scale == "paper" else _stand_ins(options),
        notes=(
            "The paper does not say how many batches it poisoned, nor for how long it trained.",
            f"Seed 0 in few batches: skipping {len(few[0]['judged'])} updates and retraining"
            f" correlates {backdoor_page.agreed(few[0]):.2f} with their AA-Scores.",
            "Alignment is no effect: it finds examples that pull in a direction, and does not say"
            " what removing one does. It is the remedy of Hammoudeh and Lowd (CCS 2022) for what"
            " the path sum misses: poison that is fitted has no gradient left.",
            *(backdoor_page.TRIED if setup.scale == "small" else ()),
        ),
    )


def _words(course: Course) -> str:
    return (
        f"{course.epochs} epoch{'s' * (course.epochs > 1)} of {course.batches} batches of"
        f" {course.batch}, learning rate {course.lr:g}"
    )


def _stand_ins(options: Options) -> tuple[str, ...]:
    if options.synthetic:
        return ("noise for CIFAR-10, a narrow ResNet-8 for ResNet-18.",)
    return (
        f"{options.few.batch * options.few.batches} and"
        f" {options.spread.batch * options.spread.batches}"
        " CIFAR-10 images of 12,000, re-encoded as JPEG.",
        "a pretrained ResNet-20, fine-tuned, for a ResNet-18 trained from scratch; a larger square,"
        " since so few images carry it.",
    )


EXPERIMENT = Experiment(
    name="backdoor",
    title="A backdoor, in few batches and in all",
    paper="§5.5, Fig. 6, Fig. 7, §E.6",
    must_show=(
        "few batches: poisoned and clean updates separate (AUC ≥ .99); every batch: example scores"
        " find the poison (AUC ≥ .95)"
    ),
    scales={
        "paper": Options(
            seeds=1, network="resnet18", pretrained=False, few=Course(128, 390, 2, 0.01),
            spread=Course(128, 390, 2, 0.01), bad=39, square=3, test=1_000, truth=20,
        ),
        "small": Options(),
        "smoke": Options(
            seeds=1, network="resnet8", pretrained=False, width=4,
            few=Course(8, 12, 2, 0.02), spread=Course(8, 12, 2, 0.02), bad=3, share=0.25, test=20,
            truth=2, synthetic=True,
        ),
    },
    run=run,
)  # fmt: skip
