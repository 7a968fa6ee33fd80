"""Blond hair and gender on CelebA: stages that teach a shortcut, and training without them.

The task is blond hair, the confounder gender. The confounder's behaviour is the log-likelihood of
"blond" for women and "not blond" for men, whatever their hair: what a model does that has taken
gender for hair (§5.3, §E.3).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec
import torch
from torch import nn

from culpa.behaviour import Behaviour
from culpa.behaviours import log_likelihood
from culpa.errors import OptionError
from culpa.experiments import agreements, confounder, measures
from culpa.experiments.data.celeba import Faces, celeba
from culpa.experiments.data.folder import DataFolder
from culpa.experiments.frame.experiment import Experiment, Setup
from culpa.experiments.frame.findings import Findings
from culpa.experiments.frame.work import Part
from culpa.experiments.pipeline import RESTART, SGD, Job, correlations, right_share, train
from culpa.experiments.resnet import normalised, pretrained, resnet

PAPER = {"DVEmb": (0.4406, 0.6304, 0.4203), "AA-Score": (0.5524, 0.6953, 0.8436)}
REMOVED = {"top": -0.1130, "bottom": 0.0856}
"""Change of the confounder's log-likelihood in the paper."""
BLOND, MALE = "Blond_Hair", "Male"


class Options(msgspec.Struct, frozen=True):
    """``stage``: images in each of the three stages; ``removal``: in all ten of the removal.

    ``group``: test images of each of four groups, as many as exist. ``size``: pixels a side.
    """

    seeds: int = 3
    network: str = "resnet20"
    pretrained: bool = True
    width: int | None = None
    size: int = 32
    stage: int = 80
    removal: int = 200
    stages: int = 10
    group: int = 40
    batch: int = 2
    lr: float = 5e-4


def split(options: Options, faces: Faces, seed: int) -> tuple[list[int], list[int]]:
    """Training rows in random order, and the balanced test rows: the four groups in turn.

    In the whole of CelebA the test part is tested on. Where there is only the training part, the
    test images are taken out of it first.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(faces.train), generator=generator)
    held = bool(faces.train.all())
    tested: list[int] = []
    for blond in (True, False):
        for male in (True, False):
            inside = (faces.has(BLOND) == blond) & (faces.has(MALE) == male)
            members = order[(inside & (faces.train if held else ~faces.train))[order]]
            # Where a group is small, half of it stays for training.
            count = min(options.group, len(members) // 2 if held else len(members))
            if count == 0:
                raise OptionError(
                    f"{faces.source} has no test images with {BLOND}={blond}, {MALE}={male}."
                )
            tested += members[:count].tolist()
    left = faces.train.clone()
    left[tested] = False
    return order[left[order]].tolist(), tested


def jobs_of(options: Options, faces: Faces, rows: list[int], stages: int) -> list[Job]:
    """Equal stages of these rows in their order."""
    labels = faces.has(BLOND).long()
    jobs: list[Job] = []
    for at, some in enumerate(torch.tensor(rows).chunk(stages)):
        images = normalised(faces.images(some.tolist(), options.size))
        batches = zip(images.split(options.batch), labels[some].split(options.batch), strict=True)
        jobs.append(Job(f"stage {at + 1}", list(batches)))
    return jobs


def behaviours_of(options: Options, faces: Faces, rows: list[int]) -> list[Behaviour]:
    """Hair, and gender taken for hair."""
    inputs = normalised(faces.images(rows, options.size))
    return [
        log_likelihood("blond or not", (inputs, faces.has(BLOND)[rows].long())),
        log_likelihood("gender (confounder)", (inputs, (~faces.has(MALE))[rows].long())),
    ]


def model_of(options: Options, seed: int, folder: DataFolder) -> nn.Module:
    """The network before training, with a new last layer."""
    if options.pretrained:
        return pretrained(options.network, 2, seed, folder)
    return resnet(options.network, 2, seed, options.width)


def examine(options: Options, folder: DataFolder, faces: Faces, seed: int, part: Part) -> Any:
    """Three stages: correlations with retraining (Table 2)."""
    rows, tested = split(options, faces, seed)
    jobs = jobs_of(options, faces, rows[: 3 * options.stage], 3)
    behaviours = behaviours_of(options, faces, tested)
    model = model_of(options, seed, folder)
    problem = train(part.folder("run"), model, jobs, SGD(options.lr))
    accuracy = right_share(model, behaviours[0].batch)
    return correlations(part.opened("run"), problem, behaviours) | {"accuracy": accuracy}


def remove(options: Options, folder: DataFolder, faces: Faces, seed: int, part: Part) -> Any:
    """Many stages of one run: the confounder without the best, and without the worst, of them."""
    rows, tested = split(options, faces, seed)
    jobs = jobs_of(options, faces, rows[: options.removal], options.stages)
    behaviours = behaviours_of(options, faces, tested)
    model = model_of(options, seed, folder)
    problem = train(part.folder("run"), model, jobs, SGD(options.lr), fresh=False)
    return confounder.removed(part.opened("run"), problem, behaviours, top=2, bottom=1)


def run(setup: Setup) -> Findings:
    """Table 2, then the removal, each for all seeds."""
    options: Options = setup.options
    faces = celeba(setup.data, required=setup.scale == "paper")
    setup.work.plan(2 * len(setup.seeds))
    found: dict[str, list[Any]] = {
        name: [
            setup.work.part(
                f"{name}-{seed}",
                {"seed": seed, "data": faces.source.name},
                partial(make, options, setup.data, faces, seed),
            )
            for seed in setup.seeds
        ]
        for name, make in (("stages", examine), ("removal", remove))
    }
    three, ten = found["stages"], found["removal"]
    names = [b.name for b in behaviours_of(options, faces, split(options, faces, 0)[1][:1])]
    stages = [f"stage {at + 1}" for at in range(3)]
    tested = len(split(options, faces, 0)[1])
    weights = "pretrained weights" if options.pretrained else "random weights"
    return Findings(
        settings=(
            f"{options.network} with {weights}, images of {options.size} x {options.size}; SGD with"
            f" batches of {options.batch}, learning rate {options.lr:g}, momentum 0.9, weight decay"
            f" 1e-5. Table 2: three stages of {options.stage:,} images. Removal: one epoch of"
            f" {options.removal:,} images in {options.stages} stages, skipped inside of the run."
            f" Tested on {tested} images, {options.group} of each of four groups or as many as"
            f" exist. {RESTART}"
        ),
        claims=(*confounder.claims(ten, 2, 1), *agreements.claims(three, PAPER)),
        tables=(
            agreements.table(three, stages, names, PAPER, tested),
            confounder.table(ten, REMOVED, 2, 1),
        ),
        figures=(confounder.figure(ten[0], names),),
        stand_ins=_stand_ins(options, faces),
        notes=(
            'The confounder\'s log-likelihood is that of "blond" for women and "not blond" for'
            " men; the paper does not define it.",
            "Normalisation layers are trained as they come: small batches have noisy statistics,"
            " which is part of what the estimates must follow.",
            "Accuracy on the balanced test images: "
            + measures.spread([f["accuracy"] for f in three], 2)
            + ".",
        ),
    )


def _stand_ins(options: Options, faces: Faces) -> tuple[str, ...]:
    given = [faces.stand_in] if faces.stand_in else []
    if options.network != "resnet18":
        given.append(f"{options.network}, made for CIFAR-10, for an ImageNet ResNet-18.")
    return tuple(given)


EXPERIMENT = Experiment(
    name="celeba",
    title="Hair and gender on CelebA",
    paper="§5.3, Table 2, §E.3",
    must_show=(
        "effects agree with retraining; skipping the stages that score highest for the confounder"
        " lowers it, skipping the lowest raises it"
    ),
    scales={
        "paper": Options(
            network="resnet18", size=224, stage=1_000, removal=4_000, group=100, seeds=1,
            batch=2, lr=5e-4,
        ),
        "small": Options(),
        "smoke": Options(
            network="resnet8", pretrained=False, width=4, size=16, stage=12, removal=24, stages=4,
            group=4, batch=4, lr=1e-3, seeds=1,
        ),
    },
    run=run,
)  # fmt: skip
