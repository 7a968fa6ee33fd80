"""What was to be reached, and what the committed results say: the first table of performance.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = tuple[str, str, str, str]
CASES = {"relu": "ReLU perceptron", "gelu": "GELU perceptron", "resnet": "ResNet-8", "gpt": "GPT-2"}
COLUMNS = ("", "goal", "reached by", "missed by")


def rows(load: Callable[[str], Any]) -> list[Row]:
    """One for each goal; ``load`` reads a file of results by its name."""
    return [
        *_recording(load("recording")["results"]),
        *_attribute(load("attribute_costs")),
        _ten_stages(load("ten_stages")),
        _side_by_side(load("replay")["side by side"]),
        *_peers(load("peers_bergson"), load("peers_dattri")),
    ]


def _row(what: str, goal: float, found: Mapping[str, float], *, least: bool = False) -> Row:
    """Each result on its side; ``least``: the goal is a lower bound."""

    def reached(value: float) -> bool:
        return value >= goal if least else round(value, 2) <= goal

    said = [
        ", ".join(f"{name} {value:.3g}" for name, value in found.items() if reached(value) is side)
        for side in (True, False)
    ]
    return what, f"{'≥' if least else '≤'} {goal:g}", said[0], said[1]


def _recording(results: Sequence[Mapping[str, Any]]) -> list[Row]:
    single = {
        r["case"].partition(",")[0].partition(" ")[0]: r for r in results if r["threads"] == 1
    }
    heavy = {name: r["ratio"] for name, r in single.items() if name in ("ResNet-8", "LoRA")}
    light = {"perceptron": single["MLP"]["ratio"]}
    return [
        _row("recording, updates of a tenth of a second", 1.03, heavy),
        _row("recording, updates of a millisecond", 1.15, light),
    ]


def _attribute(results: Sequence[Mapping[str, Any]]) -> list[Row]:
    found: list[Row] = []

    def of(kept: str, value: Callable[[Mapping[str, Any]], float | None]) -> dict[str, float]:
        made = {CASES[r["case"]]: value(r) for r in results if r["record"] == kept}
        return {name: size for name, size in made.items() if size is not None}

    bounds = (("exact", "exact", 4.0, 3.2), ("differences", "by checked differences", 2.1, 1.15))
    for way, said, thinned, kept in bounds:
        for record, goal in (("thinned", thinned), ("all kept", kept)):
            cost = of(record, lambda r, way=way: r["ratios"].get(f"{way}, 1"))
            found.append(_row(f"`attribute`, {said}, {record}", goal, cost))
    found.append(
        _row(
            "each further behaviour, exact, thinned",
            1.0,
            of("thinned", lambda r: (r["ratios"]["exact, 4"] - r["ratios"]["exact, 1"]) / 3),
        )
    )
    found.append(
        _row(
            "scores of examples besides, exact, thinned",
            0.5,
            of("thinned", lambda r: r["ratios"]["exact, 1 and examples"] - r["ratios"]["exact, 1"]),
        )
    )
    for record in ("thinned", "all kept"):
        peak = of(
            record, lambda r: r["peak MB"]["exact"]["whole"] / r["peak MB"]["training"]["whole"]
        )
        found.append(_row(f"peak memory of it over training's, {record}", 1.5, peak))
    return found


def _ten_stages(results: Sequence[Mapping[str, Any]]) -> Row:
    names = {"mlp": "perceptron", "wide": "wider one", "conv": "convolutions"}
    slow = {r["network"]: r["in_time"]["retrainings"] for r in reversed(results)}
    found = {said: slow[name] for name, said in names.items()}
    return _row("ten stages by `Secant(0.25)` over ten retrainings", 0.6, found)


def _side_by_side(results: Sequence[Mapping[str, Any]]) -> Row:
    found = {
        f"{count} of {r['case'].partition(',')[0].removeprefix('MLP ')}": of["median"]
        for r in results
        for count, of in r["over the sum"].items()
    }
    return _row("counterfactuals side by side over one after the other", 1.0, found)


def _peers(bergson: Mapping[str, Any], dattri: Mapping[str, Any]) -> list[Row]:
    ours = {"exact": bergson["of bergson's sweep"]["exact"]}
    theirs = {"`attribute`": dattri["dattri, full, over culpa.attribute"]}
    return [
        _row("of bergson's sweep, equal scores", 0.85, ours),
        _row("times faster than dattri's DVEmb", 20.0, theirs, least=True),
    ]
