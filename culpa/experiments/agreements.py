"""Table 2: correlation of estimated with retrained effects, stage by stage, beside the paper's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from culpa.experiments import measures
from culpa.experiments.frame.findings import Claim, Table
from culpa.experiments.pipeline import ADDITIVE, DVEMB, EFFECT, METHODS


def table(
    found: Sequence[Any],
    stages: Sequence[str],
    behaviours: Sequence[str],
    paper: Mapping[str, Sequence[float]],
    test: int,
) -> Table:
    """One row an estimator and behaviour, the paper's first; ``found``: of ``correlations``."""
    rows = [
        (f"{name} (the paper, {len(values)} stages)", "", *_padded(values, len(stages)))
        for name, values in paper.items()
    ]
    for method in METHODS:
        for at, behaviour in enumerate(behaviours):
            cells = [
                measures.spread([f["pearson"][method][at][s] for f in found])
                for s in range(len(stages))
            ]
            rows.append((method if at == 0 else "", behaviour, *cells))
    for at, behaviour in enumerate(behaviours):
        cells = [
            measures.spread([f["means"]["retrained"][at][s] for f in found], 4, signed=True)
            for s in range(len(stages))
        ]
        rows.append(("true mean effect, nats" if at == 0 else "", behaviour, *cells))
    return Table(
        "Correlation with retraining",
        ("", "behaviour", *stages),
        tuple(rows),
        f"Pearson correlation over {test} test points between estimated and retrained effect, mean"
        " ± standard deviation over seeds. The last stage's effect is exact in our default form.",
    )


def claims(found: Sequence[Any], paper: Mapping[str, Sequence[float]]) -> tuple[Claim, ...]:
    """The first behaviour against the paper's numbers, mean over seeds."""
    ours = {m: [fmean(row) for row in _columns(found, m)] for m in METHODS}
    theirs, words = list(paper["AA-Score"])[: len(ours[EFFECT])], _words(ours[EFFECT])
    better = sum(a - d > 5e-4 for a, d in zip(ours[ADDITIVE], ours[DVEMB], strict=True))
    return (
        Claim(
            "culpa's default agrees with retraining better than the paper's AA-Score did.",
            all(o > t for o, t in zip(ours[EFFECT], theirs, strict=False)),
            f"{words}; the paper {_words(theirs)}.",
        ),
        Claim(
            "AA-Score agrees better than DVEmb in most stages, as the paper has it.",
            2 * better > len(ours[ADDITIVE]),
            f"AA-Score {_words(ours[ADDITIVE])}; DVEmb {_words(ours[DVEMB])}.",
        ),
    )


def _columns(found: Sequence[Any], method: str) -> list[list[float]]:
    """Per stage the first behaviour's correlations over seeds."""
    first = [f["pearson"][method][0] for f in found]
    return [[row[s] for row in first] for s in range(len(first[0]))]


def _words(values: Sequence[float]) -> str:
    return " / ".join(f"{v:.3f}" for v in values)


def _padded(values: Sequence[float], count: int) -> list[str]:
    return [f"{v:.4f}" for v in values][:count] + [""] * (count - len(values))
