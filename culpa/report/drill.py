"""Drilling down, as the page shows it: of each behaviour the layers and the examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from culpa.auditing.record import AuditRecord, BehaviourFacts, ExampleFindings
from culpa.report.numbers import finite
from culpa.report.showing import SHOWN, Shown

LAYERS: Final = 5
"""Columns of the table of layers; the others are summed up."""
STAGES: Final = 12
"""Rows of it: those of the largest effects."""


@dataclass(frozen=True, kw_only=True)
class LayerRow:
    """One replayed stage: ``parts`` (the layers of the table), ``others`` and ``rest`` sum up."""

    stage: str
    effect: float
    updates: float | None
    """Its updates' scores, summed."""
    parts: list[float]
    others: float
    rest: float


@dataclass(frozen=True, kw_only=True)
class Example:
    """One training example, its score, the stages and the updates that used it."""

    number: int
    score: float
    updates: list[int]
    stages: list[str]
    shown: Shown | None


@dataclass(frozen=True, kw_only=True)
class Drill:
    """What lies below the stages, for one behaviour."""

    index: int
    behaviour: BehaviourFacts
    layers: list[str]
    more_layers: int
    rows: list[LayerRow]
    helpful: list[Example]
    harmful: list[Example]

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.rows or self.helpful or self.harmful)


def drills(record: AuditRecord, shown: Mapping[int, Shown]) -> list[Drill]:
    """For every behaviour what is known below its stages."""
    return [_drill(record, q, shown) for q in range(len(record.behaviours))]


def _drill(record: AuditRecord, q: int, shown: Mapping[int, Shown]) -> Drill:
    behaviour = record.behaviours[q]
    splits = {f.stage: f for f in record.layers if f.behaviour == behaviour.name}
    sizes: dict[str, float] = {}
    for split in splits.values():
        for layer, effect in split.effects.items():
            sizes[layer] = max(sizes.get(layer, 0.0), abs(finite(effect) or 0.0))
    layers = sorted(sizes, key=lambda layer: -sizes[layer])[:LAYERS]
    rows: list[LayerRow] = []
    for stage in record.stages:
        if stage.name in splits:
            split = splits[stage.name]
            whole = math.fsum(split.effects.values())
            parts = [split.effects.get(layer, 0.0) for layer in layers]
            rows.append(
                LayerRow(
                    stage=stage.name,
                    effect=whole + split.rest,
                    updates=stage.sums[q] if stage.sums else None,
                    parts=parts,
                    others=whole - math.fsum(parts),
                    rest=split.rest,
                )
            )
    largest = sorted(rows, key=lambda row: -abs(finite(row.effect) or 0.0))[:STAGES]
    found = next((f for f in record.examples if f.behaviour == behaviour.name), None)
    return Drill(
        index=q,
        behaviour=behaviour,
        layers=layers,
        more_layers=len(sizes) - len(layers),
        rows=[row for row in rows if row in largest],
        helpful=_examples(record, found, found.helpful if found else [], shown),
        harmful=_examples(record, found, found.harmful if found else [], shown),
    )


def _examples(
    record: AuditRecord,
    found: ExampleFindings | None,
    numbers: Sequence[int],
    shown: Mapping[int, Shown],
) -> list[Example]:
    if found is None:
        return []
    return [
        Example(
            number=i,
            score=found.scores.get(str(i), math.nan),
            updates=found.updates.get(str(i), []),
            stages=_stages(record, found.updates.get(str(i), [])),
            shown=shown.get(i),
        )
        for i in numbers[:SHOWN]
    ]


def _stages(record: AuditRecord, updates: Sequence[int]) -> list[str]:
    return [s.name for s in record.stages if any(s.start <= k < s.stop for k in updates)]
