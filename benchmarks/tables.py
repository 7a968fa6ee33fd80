"""Markdown tables, and those of runs that are walked again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Results = Mapping[str, Any]


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def again(results: Sequence[Results]) -> str:
    """The ways of walking a run again."""
    ways = {
        "counterfactual": "counterfactual",
        "replay": "`replay()`",
        "verify": '`verify(level="replay")`',
        "walk": "walk of a sweep (compared and copied)",
    }
    rows = [
        [said, *(f"{r['over plain'][way]['median']:.2f}" for r in results)]
        for way, said in ways.items()
    ]
    return table(["", *(f"{r['case']}; {r['updates']} updates" for r in results)], rows)


def sideways(results: Sequence[Results]) -> str:
    """Lanes over as many replays, and how far the lane that removes nothing has drifted."""
    counts = list(results[0]["over the sum"])
    rows = [
        [
            f"{r['case']}; {r['updates']} updates",
            *(f"{r['over the sum'][n]['median']:.2f}" for n in counts),
            r["over the sum"][counts[-1]]["claim"],
        ]
        for r in results
    ]
    return table(["", *(f"{n} of them" for n in counts), "claim"], rows)


NETWORKS = {
    "mlp": "784-128-128-10, ReLU",
    "wide": "784-512-512-10, ReLU",
    "conv": "two convolutions, ReLU",
}
"""Of the ten stages."""


def ten_stages(results: Sequence[Results]) -> str:
    """Networks and rates; the last stage, behind which nothing follows, apart."""
    rows: list[Sequence[object]] = []
    for r in results:
        *others, last = r["pearson"]
        rows.append(
            [
                NETWORKS[r["network"]],
                f"{r['rate']:g}",
                f"{r['in_time']['replays']:.2f}",
                f"{r['in_time']['retrainings']:.2f}",
                f"{r['quarter_of_a_gradient_in_time']:.2f}",
                f"{sum(others) / len(others):.3f}; {min(others):.3f}",
                f"{last:.3f}",
                "".join(grade[0].upper() for grade in r["grades"]),
            ]
        )
    columns = ["network", "rate", "sweep / ten replays", "sweep / ten retrainings"]
    columns.append("a gradient on a quarter of the rows / on all")
    columns.append("Pearson with retraining (stages 1 to 9, mean; worst)")
    return table([*columns, "last stage", "grades"], rows)
