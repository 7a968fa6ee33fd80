"""What the page shows of each behaviour: its two charts, and the tables that say the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from culpa.auditing.record import AuditRecord, BehaviourFacts, StageFinding
from culpa.report.charts import Band, Bar, Drawing, Stem, in_words, stage_bars, update_strip
from culpa.report.charts.scale import REPLAYED
from culpa.report.charts.thinning import allowance, thin
from culpa.report.numbers import count, finite, magnitude, plural, signed
from culpa.report.table import known


@dataclass(frozen=True, kw_only=True)
class Panel:
    """What the page shows of one behaviour."""

    index: int
    behaviour: BehaviourFacts
    bars: Drawing | None
    strip: Drawing | None
    groups: list[tuple[str, list[Stem]]]
    """The updates the strip shows, by stage: its table."""
    shown: int


def panel(record: AuditRecord, q: int) -> Panel:
    """The panel of behaviour ``q``. A chart without anything to show is ``None``."""
    behaviour = record.behaviours[q]
    bars = [
        Bar(
            stage=stage.name,
            effect=stage.effects[q] if known(stage, q) else None,
            score=stage.scores[q],
            replayed=stage.replayed[q],
            grade=stage.grade if grade_of(stage, q) == REPLAYED else grade_of(stage, q),
            interval=stage.intervals[q] if stage.intervals else None,
            floor=stage.floors[q] if stage.floors else None,
        )
        for stage in record.stages
    ]
    stems = _stems(record, q)
    bands = [Band(stage=s.name, start=s.start, stop=s.stop) for s in record.stages]
    total = len(record.updates.scores)
    return Panel(
        index=q,
        behaviour=behaviour,
        bars=stage_bars(
            bars,
            behaviour=behaviour.name,
            unit=behaviour.unit,
            description=_in_words(bars, behaviour),
        )
        if bars
        else None,
        strip=update_strip(
            stems,
            bands,
            num_updates=total,
            behaviour=behaviour.name,
            unit=behaviour.unit,
            description=f"Effect of {plural(len(stems), 'single update')} of "
            f"{count(total)} on {behaviour.name}, over the stages they belong to. "
            "The table after the chart holds the same ",
        )
        if stems
        else None,
        groups=_by_stage(stems, [stage.name for stage in record.stages]),
        shown=len(stems),
    )


def grade_of(stage: StageFinding, q: int) -> str:
    """Of its best number on behaviour ``q``: "replayed", or how far the estimate is trusted."""
    return stage.grades[q] if stage.grades else stage.grade


def _stems(record: AuditRecord, q: int) -> list[Stem]:
    updates = record.updates
    spans = [(stage.start, stage.stop) for stage in record.stages]
    owner = [-1] * len(updates.scores)
    for i, (start, stop) in enumerate(spans):
        for k in range(max(0, start), min(stop, len(owner))):
            owner[k] = i
    scores = [row[q] for row in updates.scores]
    return [
        Stem(
            update=k,
            stage=owner[k],
            score=scores[k],
            grade=updates.grades[k],
            growth=updates.growth[k],
            displacement=updates.displacement[k],
            learning_rate=updates.learning_rates[k],
        )
        for k in thin(scores, spans, allowance(len(record.behaviours), len(spans)))
    ]


def _by_stage(stems: Sequence[Stem], names: Sequence[str]) -> list[tuple[str, list[Stem]]]:
    groups: list[tuple[str, list[Stem]]] = []
    last: int | None = None
    for stem in stems:
        if stem.stage != last:
            groups.append(("outside of every stage" if stem.stage < 0 else names[stem.stage], []))
            last = stem.stage
        groups[-1][1].append(stem)
    return groups


def _in_words(bars: Sequence[Bar], behaviour: BehaviourFacts) -> str:
    """The chart as a sentence, for those who do not see it."""
    each = "; ".join(
        f"{bar.stage}: {in_words(bar.effect)}"
        + ("" if bar.replayed is None else f", replayed {signed(bar.replayed)}")
        + ("" if finite(bar.interval) is None else f", ± {magnitude(bar.interval)}")
        for bar in bars
    )
    return (
        f"Estimated effect of {plural(len(bars), 'stage')} on {behaviour.name} in "
        f"{behaviour.unit}. {each}. The table after the chart holds the same "
    )
