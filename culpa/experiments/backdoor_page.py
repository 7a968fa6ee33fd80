"""The table, the claims and the figure of ``backdoor``.

``few`` and ``spread`` are what its parts found, one a seed; scores are by behaviour (the attacker's
label, the true label, what the square adds) and update.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch

from culpa.experiments import measures
from culpa.experiments.frame import charts
from culpa.experiments.frame.findings import Claim, Figure, Table

LABEL, ADDED = 0, 2
PANELS = (
    "attacker's label, with the square",
    "true label, with the square",
    "what the square adds",
)


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

    same, examples = "every batch has the same share", [f["auc"] for f in spread]
    rows = (
        ("few batches", "AA-Score of updates, label", batches(LABEL), '"clearly" (Fig. 6)'),
        ("", "AA-Score of updates, added", batches(ADDED), ""),
        ("every batch", "AA-Score of updates", same, "loses its power (Fig. 7)"),
        ("", "path sum of examples, added", measures.spread(examples), ""),
    )
    rates = {0: _rates(few), 2: _rates(spread)}
    return Table(
        "What finds the poison: AUC",
        ("poison in", "score", "AUC", "the paper", "attack", "accuracy"),
        tuple((*row, *rates.get(at, ("", ""))) for at, row in enumerate(rows)),
        "AUC: the probability that a poisoned one scores higher than a clean one, for the"
        " log-likelihood of the attacker's label on test images with the square (label), or for"
        " what the square adds to it (added). Attack: share of these images that the model"
        " gives the attacker's label; accuracy: on the same images without the square.",
    )


def _rates(found: list[Any]) -> tuple[str, str]:
    attack, accuracy = ([f[name] for f in found] for name in ("attack", "accuracy"))
    return measures.spread(attack, 2), measures.spread(accuracy, 2)


def claims(few: list[Any], spread: list[Any]) -> tuple[Claim, ...]:
    """What must be shown."""
    examples = [f["auc"] for f in spread]
    label, added = ([separation(f, b) for f in few] for b in (LABEL, ADDED))
    means = [[fmean(row[k] for k in f["bad"]) for row in f["scores"]] for f in few]
    return (
        Claim(
            "Few batches: the AA-Scores of poisoned and clean batches separate (AUC ≥ .99).",
            min(label) >= 0.99,
            f"AUC {measures.spread(label)} for the attacker's label, {measures.spread(added)} for"
            " what the square adds.",
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
            min(examples) >= 0.95,
            f"AUC {measures.spread(examples)}.",
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
        "The paper's Fig. 6: the AA-Score of every update (seed 0), orange the poisoned ones;"
        " points: retraining without the update.",
        charts.strips(rows, x="update", y="effect [nats]", panel="panel", panels=PANELS, columns=1),
    )
