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
from culpa.behaviours import log_likelihood
from culpa.dynamics.identity import Identity
from culpa.estimators.adjoint import attribute
from culpa.experiments import backdoor_page, badnets, measures
from culpa.experiments.badnets import TARGET
from culpa.experiments.data.cifar10 import Cifar10, cifar10
from culpa.experiments.data.folder import DataFolder
from culpa.experiments.frame.experiment import Experiment, Setup
from culpa.experiments.frame.findings import Findings
from culpa.experiments.frame.work import Part
from culpa.experiments.pipeline import SGD, Job, right_share, train
from culpa.experiments.resnet import normalised, pretrained, resnet
from culpa.trajectory.replay import replay

FEW, SPREAD = "few batches", "every batch"
SETTINGS = (FEW, SPREAD)


class Options(msgspec.Struct, frozen=True):
    """``network``: with ``pretrained`` weights or random ones, its first layer ``width`` wide.

    ``bad``: poisoned batches, in which all is poisoned, of the ``batches`` of an epoch; ``share``:
    of all examples, where the poison is in every batch. ``square``: its side. ``truth``: so many
    updates, half of them poisoned, are skipped and retrained. ``synthetic``: images of no meaning,
    for the tests.
    """

    seeds: int = 1
    network: str = "resnet20"
    pretrained: bool = True
    width: int | None = None
    lr: float = 0.002
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch: int = 16
    batches: int = 25
    epochs: int = 2
    bad: int = 4
    share: float = 0.125
    square: int = 8
    test: int = 100
    truth: int = 4
    synthetic: bool = False


def model_of(options: Options, seed: int, data: DataFolder) -> nn.Module:
    """The network before this training."""
    if options.pretrained:
        return pretrained(options.network, 10, seed, data)
    return resnet(options.network, 10, seed, options.width)


def images_of(options: Options, folder: DataFolder) -> Cifar10:
    """CIFAR-10, as much of it as is needed."""
    counts = 2 * options.batch * options.batches, 2 * options.test
    if options.synthetic:
        return badnets.meaningless(*counts)
    return cifar10(folder, train=counts[0], test=counts[1])


def examine(options: Options, folder: DataFolder, seed: int, setting: str, part: Part) -> Any:
    """One run: scores of its updates, or of its examples, and which of them are poisoned."""
    data, generator = images_of(options, folder), torch.Generator().manual_seed(seed)
    places = [places_of(options, setting, generator) for _ in range(options.epochs)]
    images, labels = badnets.poisoned(
        data, places[0].numel(), int(places[0].sum()), options.square, generator
    )
    rows = torch.cat([badnets.arranged(some, generator) for some in places])
    model = model_of(options, seed, folder)
    others = data.test_labels != TARGET
    plain, right = (
        data.test_images[others][: options.test],
        data.test_labels[others][: options.test],
    )
    asked = normalised(badnets.patched(plain, options.square))
    target = torch.full_like(right, TARGET)
    behaviours = [
        log_likelihood("attacker's label on images with the square", (asked, target)),
        log_likelihood("true label on images with the square", (asked, right)),
        Behaviour("what the square adds", badnets.attraction, (asked, normalised(plain))),
    ]
    job = Job("training", [(images[some], labels[some]) for some in rows])
    optimizer = SGD(options.lr, options.momentum, options.weight_decay)
    problem = train(part.folder("run"), model, [job], optimizer)
    run = part.opened("run")
    found: dict[str, Any] = {
        "attack": right_share(model, (asked, target)),
        "accuracy": right_share(model, (normalised(plain), right)),
    }
    if setting == SPREAD:
        sums = attribute(run, problem, behaviours[2:], propagator=Identity(), examples=True)
        ids = torch.tensor([i for k in range(run.num_steps) for i in run.example_ids(k)])
        marked = torch.zeros(int(ids.max()) + 1, dtype=torch.bool)
        marked[ids[torch.cat(places).flatten()]] = True
        return found | {"auc": measures.auc(cast("Tensor", sums.examples)[:, 0], marked)}
    bad = torch.cat(places).all(1).nonzero().flatten().tolist()
    judged = _judged(options, run.num_steps, bad, generator)
    return found | {
        "scores": attribute(run, problem, behaviours).steps.T.tolist(),
        "bad": bad,
        "judged": judged,
        "truth": [
            float(replay(run, problem, without=[k]).effect(behaviours[0]).mean()) for k in judged
        ],
    }


def places_of(options: Options, setting: str, generator: torch.Generator) -> Tensor:
    """Where in an epoch the poison is, bool ``[batches, batch]``."""
    if setting == FEW:
        return badnets.few(options.batches, options.batch, options.bad, generator)
    return badnets.every(options.batches, options.batch, options.share)


def _judged(options: Options, steps: int, bad: list[int], generator: torch.Generator) -> list[int]:
    """Updates to be skipped for comparison: half of them poisoned ones, where there are such."""
    clean = [k for k in range(steps) if k not in bad]
    chosen: list[int] = []
    for members in (bad, clean):
        order = torch.randperm(len(members), generator=generator)[: options.truth // 2]
        chosen += [members[int(i)] for i in order]
    return sorted(chosen)


def run(setup: Setup) -> Findings:
    """Both settings, all seeds; the figures are of the first."""
    options: Options = setup.options
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
            f"{options.network}{' with pretrained weights' * options.pretrained}, SGD with learning"
            f" rate {options.lr:g}, momentum {options.momentum:g}, weight decay"
            f" {options.weight_decay:g}; {options.epochs} epoch(s) of {options.batches} batches of"
            f" {options.batch}. BadNets: a white square of {options.square} x {options.square} in a"
            f" corner and the label 0. Either {options.bad} batches of an epoch are all poison, or"
            f" {options.share:.1%} of every batch."
        ),
        claims=backdoor_page.claims(few, spread),
        tables=(backdoor_page.table(few, spread),),
        figures=(backdoor_page.figure(few[0]),),
        stand_ins=() if setup.scale == "paper" else _stand_ins(options),
        notes=(
            "The paper does not say how many batches it poisoned, nor for how long it trained.",
            f"Seed 0 in few batches: skipping {len(few[0]['judged'])} updates and retraining"
            f" correlates {backdoor_page.agreed(few[0]):.2f} with their AA-Scores.",
        ),
    )


def _stand_ins(options: Options) -> tuple[str, ...]:
    if options.synthetic:
        return ("noise for CIFAR-10, a narrow ResNet-8 for ResNet-18.",)
    return (
        f"{options.batch * options.batches} CIFAR-10 images of 12,000, re-encoded as JPEG.",
        "a pretrained ResNet-20, fine-tuned for one epoch, for a ResNet-18 trained from scratch; a"
        " larger square, since so few images carry it.",
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
            network="resnet18", pretrained=False, lr=0.01, batch=128, batches=390, bad=39,
            share=0.1, square=3, test=1_000, truth=20,
        ),
        "small": Options(),
        "smoke": Options(
            network="resnet8", pretrained=False, width=4, lr=0.02, batch=8, batches=12, bad=3,
            share=0.25, test=20, truth=2, synthetic=True,
        ),
    },
    run=run,
)  # fmt: skip
