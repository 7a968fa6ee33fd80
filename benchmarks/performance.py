"""Writes the measured tables of the pages in ``PAGES`` from benchmarks/results.

    python benchmarks/performance.py

A table stands between ``<!-- name -->`` and ``<!-- end -->``; the words around it are written by
hand. tests/test_benchmarks.py holds the page to the results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import goals
from tables import Results, again, sideways, table, ten_stages

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {
    ROOT / "docs" / "performance.md": (
        *("goals", "recording", "again", "sideways"),
        *("peers", "growth", "guard"),
    ),
    ROOT / "docs" / "scaling.md": ("held", "parameters", "fanout"),
    ROOT / "docs" / "distributed.md": ("in_shards",),
    ROOT / "docs" / "results" / "attribute_costs.md": ("attribute",),
    ROOT / "docs" / "results" / "ten_stages.md": ("ten stages",),
}
GAPS = ("steps", "stages", "examples")
"""Of scores."""
MB = ("raised", "whole")
"""Of peak memory."""


def peers(bergson: Results, dattri: Results) -> str:
    """Both comparisons, one line a method."""
    ratios, agreed = bergson["times plain training"], bergson["against bergson's scores"]
    peaks = {n: size / 1e6 for n, size in bergson["peak memory, bytes"].items()}
    theirs = "bergson, MAGIC with √K checkpoints"
    rows: list[Sequence[object]] = [
        ["GPT-2, AdamW", theirs, ratios["bergson sweep"], f"{peaks['bergson']:.0f} MB", ""]
    ]
    for name, said in (("exact", "`Exact()`"), ("differences", '`Exact("checked-difference")`')):
        of = bergson["of bergson's sweep"][name]
        gap = f"equal to bergson's but for {agreed[name]['largest gap']:.0e} of the largest"
        rows.append(
            [
                "",
                f"`culpa.attribute`, {said}",
                f"{ratios[f'culpa {name}']} ({of} of bergson's)",
                f"{peaks[name]:.0f} MB",
                gap,
            ]
        )
    times, rates = dattri["times plain training"], dattri["by learning rate"]
    for at, name in enumerate(times):
        found = [rate["correlation with retraining"][name] for rate in rates]
        said = "correlation with retraining " + ", ".join(f"{r:.3f}" for r in found)
        rows.append(["digits, SGD" * (at == 0), name, times[name], "", said])
    columns = ["task", "method", "times plain training", "peak memory", "agreement"]
    return f"{table(columns, rows)}{_note(bergson)}{_note(dattri)}"


def recording(results: Results) -> str:
    """Time over the same loop alone, and bytes over those of every state."""
    rows = [
        [
            f"{r['case']}; {r['updates']:,} updates",
            r["threads"],
            f"{r['plain_microseconds_cpu'] / 1e3:.3g} ms",
            f"{r['ratio']:.2f} ({r['ratio_range'][0]:.2f}-{r['ratio_range'][1]:.2f})",
            f"{r['ratio_per_update']:.2f}",
            f"{r['ratio_per_update_cpu']:.2f}",
            f"{r['once_updates']:.1f}",
            f"{r['total_to_every_state']:.2f}",
        ]
        for r in results["results"]
    ]
    columns = ["run", "threads", "an update", "times plain training", "each further update"]
    columns += ["its processor time", "once, in updates", "bytes, of every state's"]
    return f"{table(columns, rows)}{_note(results)}"


def attribute(results: Sequence[Results]) -> str:
    """What a sweep costs, by run and record; each further behaviour is a third of three more."""
    rows: list[list[str]] = []
    for result in results:
        ratios, peak = result["ratios"], result["peak MB"]
        cells = [f"{ratios['replay']:.2f}"]
        for way in ("exact", "differences"):
            one, four = ratios.get(f"{way}, 1"), ratios.get(f"{way}, 4")
            if one is None:
                cells += ["", "", ""]
                continue
            low, high = result["ranges"][f"{way}, 1"]
            by_example = ratios[f"{way}, 1 and examples"]
            cells += [f"{one:.2f} ({low:.2f}-{high:.2f})", f"{(four - one) / 3:.2f}"]
            cells.append(f"{by_example:.2f}")
        (before, after), (was, now) = ([peak[w][of] for w in ("training", "exact")] for of in MB)
        cells.append(f"{before:.0f} → {after:.0f} MB ({now / was:.2f})")
        rows.append([f"{result['case']}, {result['updates']} updates", result["record"], *cells])
    columns = ["run", "record", "replay alone"]
    for way in ("exact", "checked differences"):
        columns += [way, "each further", "with examples"]
    return table([*columns, "memory"], rows)


def growth(results: Results) -> str:
    """Exponents, and the ratios at both ends of every panel."""
    rows: list[Sequence[object]] = []
    for axis, points in results["growth"].items():
        ends = points[0], points[-1]
        span = f"{axis} {ends[0][axis]:,} to {ends[1][axis]:,}"
        cells = [
            f"{results['exponents'][axis][part]:.2f} ({' → '.join(_ratio(e, part) for e in ends)})"
            for part in ("record", "replay", "attribute", "embed")
        ]
        rows.append([span, f"{results['exponents'][axis]['plain']:.2f}", *cells])
    memory = results["memory"]
    span = f"memory, {memory[0]['updates']:,} to {memory[-1]['updates']:,} updates"
    cells = [
        f"{results['exponents']['memory'][part]:.2f}"
        f" ({memory[0]['bytes'][part] / 1e6:.0f} → {memory[-1]['bytes'][part] / 1e6:.0f} MB)"
        for part in ("record", "replay", "attribute", "embed")
    ]
    rows.append([span, "", *cells])
    few = results["exponents"]["updates"]["embed, Krylov"]
    ends = [results["growth"]["updates"][at]["seconds"]["embed, Krylov"] for at in (0, -1)]
    said = f"`Krylov` from stage checkpoints, updates: {few:.2f} ({ends[0]:.2f} → {ends[1]:.2f} s)."
    parts = ["", "plain training", "record", "replay", "attribute", "embed"]
    return f"{table(parts, rows)}\n\n{said}{_note(results)}"


def _note(results: Results) -> str:
    """What its reader must know, if anything."""
    return f"\n\n*{results['note'][:1].upper()}{results['note'][1:]}.*" if "note" in results else ""


def _ratio(point: Results, part: str) -> str:
    return f"{point['times plain training'][part]:.3g}"


def guard(results: Results) -> str:
    """What is committed."""
    return table(["", "times plain training"], results.items())


def parameters(results: Results) -> str:
    """Adapters on base models of several sizes."""
    rows = [
        [
            f"{r['parameters']:,}",
            f"{r['trained']:,}",
            f"{r['seconds_an_update']:.2g} s",
            *(f"{r['time'][w]:.2f}" for w in ("record", "replay", "attribute")),
            f"{r['memory_of_training'] / 1e6:.0f} MB",
            *(f"{r['memory'][w]:.2f}" for w in ("record", "replay", "attribute")),
            f"{r['bytes_on_disk'] / 1e6:.1f} MB",
        ]
        for r in results["results"]
    ]
    columns = ["parameters", "trained", "an update", "record", "replay", "attribute"]
    memory = ["training's memory", "record", "replay", "attribute", "on disk"]
    return table([*columns, *memory], rows)


def held(results: Results) -> str:
    """Half precision of what waits: what scores lose, and what bytes are saved."""
    rows: list[list[str]] = []
    for case in results["scores"]:
        for name, said in (("bfloat16", case["case"]), ("states rounded", "")):
            found = case.get(name)
            gaps = [f"{found[w]:.0e}" if found else "refused" for w in GAPS]
            way = "`dtype=torch.bfloat16`" if name == "bfloat16" else "states rounded themselves"
            rows.append([said, way, *gaps])
    spaces = [
        [where, f"{of['memory'] / 1e6:.0f} MB", f"{of['disk'] / 1e6:.0f} MB" if of["disk"] else ""]
        for where, of in results["bytes"].items()
    ]
    scores = table(["run", "what waits", *GAPS], rows)
    return f"{scores}\n\n{table(['waiting', 'memory', 'disk'], spaces)}{_note(results)}"


def fanout(results: Results) -> str:
    """Wall time of the same replays."""
    rows = [["this process", "1"]]
    for name, ratio in results["ratios"].items():
        count, _, how = name.partition(" ")
        workers = f"{count} worker{'s' * (count != '1')}"
        said = "with their start" if how == "cold" else "already running"
        rows.append([f"{workers}, {said}", f"{ratio:.2f}"])
    head = [f"{results['what']}, {results['updates']} updates", "times"]
    return f"{table(head, rows)}{_note(results)}"


def in_shards(results: Results) -> str:
    """Peak memory of a rank and processor time of all, by job and number of ranks."""
    counts = list(dict.fromkeys(row["ranks"] for row in results["rows"]))
    found = {(row["job"], row["ranks"]): row for row in results["rows"]}
    rows: list[Sequence[object]] = []
    for job in dict.fromkeys(row["job"] for row in results["rows"]):
        line: list[object] = [job]
        for count in counts:
            row = found[job, count]
            both = f"{row['first rank']:.1f} / {row['other ranks, most']:.1f}"
            line += [both, f"{row['time']:.1f}"]
        rows.append(line)
    head = [h for n in counts for h in (f"{n} ranks: memory, rank 0 / others", "time")]
    return table(["job", *head], rows)


def rendered(page: Path) -> str:
    """The page with every table made from the results."""
    text = page.read_text(encoding="utf-8")

    def load(name: str) -> Any:
        return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))

    tables = {
        "goals": lambda: table(goals.COLUMNS, goals.rows(load)),
        "peers": lambda: peers(load("peers_bergson"), load("peers_dattri")),
        "recording": lambda: recording(load("recording")),
        "attribute": lambda: attribute(load("attribute_costs")),
        "again": lambda: again(load("replay")["again"]),
        "sideways": lambda: sideways(load("replay")["side by side"]),
        "ten stages": lambda: ten_stages(load("ten_stages")),
        "growth": lambda: growth(load("growth")),
        "guard": lambda: guard(load("guard")),
        "held": lambda: held(load("held")),
        "parameters": lambda: parameters(load("parameters")),
        "fanout": lambda: fanout(load("fanout")),
        "in_shards": lambda: in_shards(load("in_shards")),
    }
    for name in PAGES[page]:
        made = tables[name]()
        place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, found = place.subn(lambda m, made=made: f"{m[1]}\n{made}\n\n{m[2]}", text)
        if found != 1:
            raise ValueError(f"{page} has {found} places for the table {name!r}, not one")
    return text


def main() -> None:
    """Write the pages."""
    for page in PAGES:
        page.write_text(rendered(page), encoding="utf-8")


if __name__ == "__main__":
    main()
