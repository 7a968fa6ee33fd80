"""Toxicity and who is mentioned: stages by identity, and stages that teach a shortcut.

The confounder's behaviour is the log-likelihood of "toxic" for comments that mention the identity
and "not toxic" for the others, whatever they say (§5.3, §E.4).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec
import torch
from torch import Tensor

from culpa.behaviour import Behaviour
from culpa.behaviours import log_likelihood
from culpa.errors import OptionError
from culpa.experiments import agreements, confounder, measures
from culpa.experiments.classifier import BYTES, Classifier, Language, classifier
from culpa.experiments.data.civilcomments import Comments, civilcomments
from culpa.experiments.data.folder import DataFolder
from culpa.experiments.frame.experiment import Experiment, Setup
from culpa.experiments.frame.findings import Claim, Figure, Findings, Table
from culpa.experiments.frame.work import Part
from culpa.experiments.pipeline import RESTART, SGD, Job, correlations, right_share, train

PAPER = {"DVEmb": (0.7766, 0.9569, 0.8514), "AA-Score": (0.8576, 0.9789, 0.9746)}
TOP, BOTTOM = 3, 2


class Options(msgspec.Struct, frozen=True):
    """``identities``: one a stage, of ``stage`` comments, or as many as there are.

    ``removal``: comments in all ten stages of the removal; ``confounder``: its identity; ``group``:
    test comments of each of four groups, or as many as there are. ``rates``: learning rates, the
    paper's first. ``tokens``: of a comment, the first so many.
    """

    seeds: int = 3
    model: str = "stories260K"
    identities: tuple[str, ...] = ("christian", "other_religions", "male")
    confounder: str = "christian"
    stage: int = 150
    removal: int = 2_500
    stages: int = 10
    group: int = 30
    batch: int = 25
    tokens: int = 24
    rates: tuple[float, ...] = (1e-4, 3e-3, 3e-2)


def split(options: Options, comments: Comments, seed: int) -> tuple[list[int], list[int]]:
    """Training rows in random order, and the test rows: toxic or not, identity or not, in turn.

    Where there is only a training part, the test comments are taken out of it first.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(comments.texts), generator=generator)
    held = bool(comments.train.all())
    pool = comments.train if held else ~comments.train
    tested: list[int] = []
    for toxic in (True, False):
        for mentioned in (True, False):
            inside = (comments.toxic == toxic) & (
                comments.mentions(options.confounder) == mentioned
            )
            members = order[(inside & pool)[order]]
            count = min(options.group, len(members) // 2 if held else len(members))
            if count == 0:
                raise OptionError(
                    f"{comments.name} has no test comments with toxic={toxic} and"
                    f" {options.confounder}={mentioned}."
                )
            tested += members[:count].tolist()
    left = comments.train.clone()
    left[tested] = False
    return order[left[order]].tolist(), tested


def job(options: Options, comments: Comments, name: str, rows: list[int], words: Language) -> Job:
    """One stage: these comments in batches."""
    encoded = words([comments.texts[r] for r in rows], options.tokens)
    labels = comments.toxic[rows].long()
    cuts = torch.arange(len(rows)).split(options.batch)
    return Job(name, [({n: t[c] for n, t in encoded.items()}, labels[c]) for c in cuts])


def behaviours_of(
    options: Options, comments: Comments, rows: list[int], words: Language
) -> list[Behaviour]:
    """Toxicity, and the identity taken for it."""
    encoded = words([comments.texts[r] for r in rows], options.tokens)
    mentioned = comments.mentions(options.confounder)[rows].long()
    return [
        log_likelihood("toxic or not", (encoded, comments.toxic[rows].long())),
        log_likelihood("identity (confounder)", (encoded, mentioned)),
    ]


Made = tuple[Classifier, Language, list[int], list[int]]


def _begun(options: Options, folder: DataFolder, comments: Comments, seed: int) -> Made:
    return *classifier(options.model, seed, folder), *split(options, comments, seed)


def examine(
    options: Options, folder: DataFolder, comments: Comments, seed: int, rate: float, part: Part
) -> Any:
    """A stage for each identity: correlations with retraining (Table 2)."""
    model, words, rows, tested = _begun(options, folder, comments, seed)
    jobs: list[Job] = []
    for identity in options.identities:
        flags = comments.mentions(identity)
        some = [r for r in rows if bool(flags[r])][: options.stage]
        jobs.append(job(options, comments, identity, some, words))
    behaviours = behaviours_of(options, comments, tested, words)
    before = right_share(model, behaviours[0].batch)
    problem = train(part.folder("run"), model, jobs, SGD(rate))
    shares = {"before": before, "accuracy": right_share(model, behaviours[0].batch)}
    return correlations(part.opened("run"), problem, behaviours) | shares


def remove(
    options: Options, folder: DataFolder, comments: Comments, seed: int, rate: float, part: Part
) -> Any:
    """Ten stages of one run, comments that mention the identity in random places (Fig. 4)."""
    model, words, rows, tested = _begun(options, folder, comments, seed)
    cuts: tuple[Tensor, ...] = torch.tensor(rows[: options.removal]).chunk(options.stages)
    jobs = [
        job(options, comments, f"stage {at + 1}", some.tolist(), words)
        for at, some in enumerate(cuts)
    ]
    behaviours = behaviours_of(options, comments, tested, words)
    problem = train(part.folder("run"), model, jobs, SGD(rate), fresh=False)
    return confounder.removed(part.opened("run"), problem, behaviours, top=TOP, bottom=BOTTOM)


def run(setup: Setup) -> Findings:
    """Both parts at every learning rate, for all seeds."""
    options: Options = setup.options
    comments = civilcomments(setup.data, required=setup.scale == "paper")
    setup.work.plan(2 * len(setup.seeds) * len(options.rates))
    found: dict[tuple[str, float], list[Any]] = {
        (name, rate): [
            setup.work.part(
                f"{name}-{rate:g}-{seed}",
                {"seed": seed, "rate": rate, "data": comments.name},
                partial(make, options, setup.data, comments, seed, rate),
            )
            for seed in setup.seeds
        ]
        for rate in options.rates
        for name, make in (("stages", examine), ("removal", remove))
    }
    tested = len(split(options, comments, 0)[1])
    names = ("toxic or not", "identity (confounder)")
    drawn = options.rates[len(options.rates) // 2]
    claims: list[Claim] = []
    tables: list[Table] = []
    for rate in options.rates:
        three, ten = found["stages", rate], found["removal", rate]
        made = (*confounder.claims(ten, TOP, BOTTOM), *agreements.claims(three, PAPER))
        claims += [_at(rate, claim) for claim in made]
        both = (
            agreements.table(three, options.identities, names, PAPER, tested),
            confounder.table(ten, None, TOP, BOTTOM),
        )
        tables += [msgspec.structs.replace(t, title=f"{t.title}; rate {rate:g}") for t in both]
    return Findings(
        settings=(
            f"{options.model}, frozen, with LoRA of rank 8 on queries, keys and values and a"
            f" classification head; comments of {options.tokens} tokens; SGD with batches of"
            f" {options.batch}, momentum 0.9, weight decay 1e-5, one epoch. Table 2: stages of"
            f" comments that mention {', '.join(options.identities)}, {options.stage} or as many as"
            f" there are. Removal: {options.removal:,} comments in {options.stages} stages, skipped"
            f" inside of the run. Tested on {tested} comments. {RESTART}"
        ),
        claims=tuple(claims),
        tables=tuple(tables),
        figures=(_figure(found["removal", drawn][0], names, drawn),),
        stand_ins=_stand_ins(options, comments),
        notes=(
            f'The confounder\'s log-likelihood is that of "toxic" for comments that mention'
            f" {options.confounder}; the paper does not define it.",
            *(
                f"Learning rate {rate:g}: accuracy on the test comments, which are chosen by group,"
                f" {measures.spread([f['before'] for f in found['stages', rate]], 2)} before and"
                f" {measures.spread([f['accuracy'] for f in found['stages', rate]], 2)} after."
                for rate in options.rates
            ),
        ),
    )


def _figure(found: Any, names: tuple[str, str], rate: float) -> Figure:
    figure = confounder.figure(found, names)
    return msgspec.structs.replace(figure, caption=f"{figure.caption} Learning rate {rate:g}.")


def _at(rate: float, claim: Claim) -> Claim:
    return msgspec.structs.replace(claim, text=f"{claim.text[:-1]} (learning rate {rate:g}).")


def _stand_ins(options: Options, comments: Comments) -> tuple[str, ...]:
    given = [comments.stand_in] if comments.stand_in else []
    if options.model == BYTES:
        given.append("a Llama with random weights that reads bytes, for Gemma 3.")
    elif not options.model.startswith("gemma"):
        given.append(
            f"{options.model}, a Llama of 260,032 parameters that has read children's stories, for"
            " Gemma 3; other religions for black, which has 24 comments."
        )
    return tuple(given)


EXPERIMENT = Experiment(
    name="civilcomments",
    title="Toxicity and identity in comments",
    paper="§5.3, Fig. 4, Table 2, §E.4",
    must_show=(
        "effects agree with retraining; skipping the top three stages for the confounder lowers it,"
        " skipping the bottom two raises it"
    ),
    scales={
        "paper": Options(
            seeds=1, model="gemma-3-270m", identities=("christian", "black", "male"), stage=1_600,
            removal=5_000, group=100, batch=50, tokens=128, rates=(1e-4,),
        ),
        "small": Options(),
        "smoke": Options(
            seeds=1, model=BYTES, stage=8, removal=24, stages=6, group=4, batch=4, tokens=12,
            rates=(1e-2,),
        ),
    },
    run=run,
)  # fmt: skip
