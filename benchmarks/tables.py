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


def ten_stages(results: Sequence[Results]) -> str:
    """Networks and rates."""
    rows = [
        [
            f"{r['network']}, rate {r['rate']:g}",
            f"{r['in_time']['retrainings']:.2f}",
            f"{r['in_time']['replays']:.2f}",
            f"{min(r['pearson'][:-1]):.3f}",
            ", ".join(f"{r['grades'].count(g)} {g}" for g in dict.fromkeys(r["grades"])),
        ]
        for r in results
    ]
    columns = ["", "over retrainings", "over replays", "least correlation with retraining"]
    return table([*columns, "grades"], rows)
