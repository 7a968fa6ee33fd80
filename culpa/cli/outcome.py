"""``culpa replay`` as a person reads it, and as a program does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from culpa.behaviour import Behaviour
from culpa.report.numbers import plural, signed, visible
from culpa.trajectory.replay import Counterfactual

ESTIMATED = "estimated, "
"""What the claim of an estimated model begins with; its grade follows."""


def replayed(
    without: Sequence[str],
    found: Counterfactual,
    behaviours: Sequence[Behaviour],
    weights: Path | None,
) -> Iterator[RenderableType]:
    """What was left out, the true effects, and what they may claim."""
    cost = plural(found.updates_executed, "update")
    if not found.without:
        yield Text(f"The run itself, executed again ({cost}). {claimed(found.claim)}")
    else:
        names, removed = ", ".join(map(visible, without)), plural(len(found.without), "update")
        how = removed if found.claim.startswith(ESTIMATED) else f"{removed}; {cost} executed"
        yield Text(f"Without {names} ({how}). {claimed(found.claim)}")
        yield ""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        table.add_column("Behaviour", overflow="fold")
        kind = "Estimated" if found.claim.startswith(ESTIMATED) else "True"
        table.add_column(f"{kind} effect", justify="right")
        table.add_column("Unit")
        for behaviour in behaviours:
            effect = float(found.effect(behaviour).mean())
            table.add_row(Text(visible(behaviour.name)), signed(effect), visible(behaviour.unit))
        yield table
        yield ""
        yield "> 0: what was left out had raised the behaviour; < 0: it had lowered it."
    if weights is not None:
        yield Text(f"The model: {weights}")


def claimed(claim: str) -> str:
    """The claim as a sentence."""
    if claim == "bitwise":
        return "Bitwise: the environment is the recorded one, and so are the observed updates."
    if claim.startswith(ESTIMATED):
        return f"Not replayed: {claim}. A replay (without --estimate) proves it."
    return f"Not bitwise: {claim} from the record, relative, measured at the kept states."


def replayed_facts(
    path: str,
    without: Sequence[str],
    found: Counterfactual,
    behaviours: Sequence[Behaviour],
    weights: Path | None,
) -> dict[str, Any]:
    """The same as data."""
    return {
        "run": path,
        "without": list(without),
        "counterfactual": found.counterfactual,
        "claim": found.claim,
        "updates_removed": len(found.without),
        "updates_executed": found.updates_executed,
        "effects": [
            {"behaviour": b.name, "unit": b.unit, "effect": float(found.effect(b).mean())}
            for b in behaviours
        ],
        "weights": None if weights is None else str(weights),
    }
