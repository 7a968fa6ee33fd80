"""The table, the claims and the figure of ``backdoor``.

``few`` and ``spread`` are what its parts found, one a seed; scores of updates are AA-Scores for the
attacker's label and for the true one, and the alignment with what the square adds.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch

from culpa.experiments import measures
from culpa.experiments.frame import charts
from culpa.experiments.frame.findings import Claim, Figure, Table

LABEL, TRUE, ADDED = range(3)
SUM, ALIGNED, LABELLED = "path sum", "alignment", ", attacker's label"
"""Scores of examples, and what is appended where only those with that label are compared."""
PANELS = (
    "attacker's label, with the square",
    "true label, with the square",
    "alignment with what the square adds",
)
TRIED = (
    "The settings were chosen on seeds 0 and 1, the AUC in view; seed 2 was not looked at. Every"
    " batch poisoned: learning rate .001 (attack .46) and .003 (.62) with 480 images, .003 (.72)"
    " with 1,280; .01 with 1,280 gave .92 after two and after three epochs. There the path sum for"
    " the difference of log-likelihoods had an AUC of .32 and that for log-odds .75; alignment .93"
    " after two epochs, .97 and .99 (seeds 0 and 1) after three, and 1.00 after four with 960"
    " images (seed 1).",
    "Few batches: the setting was chosen on seeds 0 and 1, the AUC in view, among rates from .001"
    " to .01, 1 to 4 epochs, squares of 8 to 12, with attacks from .08 to .86. The more of the"
    " backdoor is learnt, the less a single poisoned update is missed: AUC of AA-Scores .993 with"
    " an attack of .08 (rate .001, 60 updates of 16, 12 of them poisoned, seed 1), .997 and .979"
    " with .21 and .15 (.0015, seeds 0 and 1), .985 with .19 (.002, 50 updates, 8 poisoned), .78"
    " with .53 (.0015, 15 of 60, a square of 12), .76 with .48, .66 with .36 (.004, 48 updates of"
    " 32, mean of three seeds), .52 with .64 (.0015, 24 of 80, a square of 10), .50 with .52 (.01,"
    " 60 of 32). Retraining agrees: the updates skipped in the learnt settings had the sign of"
    " their score, among them a poisoned one that had lowered the attacker's label (-.36 nats,"
    " score -.24). So the paper's clear separation is that of a backdoor that is not learnt yet."
    " With the normalisation's statistics held fixed, batches of nothing but poison drove the"
    " accuracy below .1 from rate .002 on.",
)
"""What was tried on the way, seed 0 unless said otherwise."""


def separation(found: Any, behaviour: int) -> float:
    """AUC of the updates' scores."""
    scores = torch.tensor(found["scores"][behaviour])
    marked = torch.zeros(len(scores), dtype=torch.bool)
    marked[found["bad"]] = True
    return measures.auc(scores, marked)


def agreed(found: Any) -> float:
    """Correlation of some updates' scores with skipping them and retraining."""
    some = torch.tensor(found["scores"][LABEL])[found["judged"]]
    return measures.pearson(some, torch.tensor(found["truth"]))


def table(few: list[Any], spread: list[Any]) -> Table:
    """AUC by setting, score and behaviour."""

    def batches(behaviour: int) -> str:
        return measures.spread([separation(f, behaviour) for f in few])

    def examples(kind: str) -> str:
        return measures.spread([f["auc"][kind] for f in spread])

    same = "every batch has the same share"
    rows = (
        ("few batches", "AA-Score of updates, label", batches(LABEL), '"clearly" (Fig. 6)'),
        ("", "alignment of updates, added", batches(ADDED), ""),
        ("every batch", "AA-Score of updates", same, "loses its power (Fig. 7)"),
        ("", "path sum of examples, added", examples(SUM), ""),
        ("", "path sum, examples with the attacker's label only", examples(SUM + LABELLED), ""),
        ("", "alignment of examples, added", examples(ALIGNED), ""),
        ("", "alignment, those with that label only", examples(ALIGNED + LABELLED), ""),
    )
    rates = {0: _rates(few), 2: _rates(spread)}
    return Table(
        "What finds the poison: AUC",
        ("poison in", "score", "AUC", "the paper", "attack", "accuracy"),
        tuple((*row, *rates.get(at, ("", ""))) for at, row in enumerate(rows)),
        "AUC: the probability that a poisoned one scores higher than a clean one, for the"
        " log-likelihood of the attacker's label on test images with the square (label), or for"
        " what the square adds to its log-odds (added). Path sum:"
        " `attribute(..., propagator=Identity(), examples=True)`. Alignment: the same sum with"
        " every visit divided by one minus the probability of the example's own label, so that"
        " an example counts alike whether it is fitted or not; of an update, the mean over its"
        " examples. Attack: share of the images with"
        " the square that the model gives the attacker's label; accuracy: on the same images"
        " without it.",
    )


def _rates(found: list[Any]) -> tuple[str, str]:
    attack, accuracy = ([f[name] for f in found] for name in ("attack", "accuracy"))
    return measures.spread(attack, 2), measures.spread(accuracy, 2)


def claims(few: list[Any], spread: list[Any]) -> tuple[Claim, ...]:
    """What must be shown."""
    sums, aligned = ([f["auc"][kind] for f in spread] for kind in (SUM, ALIGNED))
    attacks = [[f["attack"] for f in found] for found in (few, spread)]
    label, added = ([separation(f, b) for f in few] for b in (LABEL, ADDED))
    means = [[fmean(row[k] for k in f["bad"]) for row in f["scores"]] for f in few]
    return (
        Claim(
            "Few batches: the AA-Scores of poisoned and clean batches separate (AUC ≥ .99).",
            min(label) >= 0.99,
            f"AUC {measures.spread(label)}, least {min(label):.3f}, for the attacker's label.",
        ),
        Claim(
            "Few batches: the alignments of poisoned and clean batches separate (AUC ≥ .99).",
            min(added) >= 0.99,
            f"AUC {measures.spread(added)}, least {min(added):.3f}.",
        ),
        Claim(
            "Poisoned batches raise the attacker's label and lower the true one.",
            all(up > 0 > down for up, down, _ in means),
            "Mean AA-Score of a poisoned batch: "
            + "; ".join(f"{up:+.3f} and {down:+.3f} nats" for up, down, _ in means)
            + ".",
        ),
        Claim(
            "Every batch: example scores find the poison (AUC ≥ .95).",
            min(aligned) >= 0.95,
            f"AUC {measures.spread(aligned)} by alignment, at least {min(aligned):.3f};"
            f" {measures.spread(sums)} by the path sum.",
        ),
        Claim(
            "The backdoor is learnt: the attack succeeds on most images.",
            min(share for shares in attacks for share in shares) > 0.5,
            f"On {measures.spread(attacks[0], 2)} with poison in few batches, on"
            f" {measures.spread(attacks[1], 2)} with poison in every batch.",
        ),
    )


def figure(found: Any) -> Figure:
    """The paper's Fig. 6."""
    judged = dict(zip(found["judged"], found["truth"], strict=True))
    rows = [
        {"panel": panel, "x": k, "value": value, "marked": k in found["bad"]}
        | ({"truth": judged[k]} if panel == PANELS[LABEL] and k in judged else {})
        for panel, values in zip(PANELS, found["scores"], strict=True)
        for k, value in enumerate(values)
    ]
    return Figure(
        "updates",
        "The paper's Fig. 6: the AA-Score of every update in nats (seed 0), orange the poisoned"
        " ones, points: retraining without the update; and the alignment of its examples.",
        charts.strips(rows, x="update", y="score", panel="panel", panels=PANELS, columns=1),
    )
