"""The audit as a section of a model card, "Training accountability", in Hugging Face's Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

from culpa.auditing.record import AuditRecord
from culpa.report.matrix import best_of
from culpa.report.numbers import ABSENT, count, finite, half_width, plural, signed
from culpa.report.panels import grade_of
from culpa.report.record_check import checked
from culpa.report.table import largest_effect

TITLE: Final = "Training accountability"
_ACTIVE: Final = re.compile(r"[\\`*_{}\[\]<>()#!|~$&@]|:(?=//)|(?<=www)\.|^[+-]", re.IGNORECASE)
"""Characters that act anywhere; those that make an address a link; those that begin a list."""


def to_markdown(record: AuditRecord) -> str:
    """The section: verdicts, a table of stages for each behaviour, how it was found, cautions.

    A heading of the second level, as model cards have them. Every text of the record is escaped:
    no name can become a link, a picture, HTML or another row.

    Raises:
        OptionError: if the record contradicts itself.
    """
    record = checked(record)
    return "\n".join(_lines(record)).rstrip() + "\n"


def _lines(record: AuditRecord) -> Iterator[str]:
    run = record.run
    yield from (f"## {TITLE}", "")
    yield (
        "Which stage of training is to be credited or blamed for what this model does, by"
        f" [culpa](https://arxiv.org/abs/2506.00175) {plain(record.culpa_version)}. The effect of a"
        " stage is the behaviour of the model as trained, minus that of the model training would"
        f" have ended with had the stage not been executed (counterfactual:"
        f" {plain(run.counterfactual)})."
    )
    yield ""
    yield from (f"- {plain(verdict)}" for verdict in record.verdicts)
    for q, behaviour in enumerate(record.behaviours):
        unit, largest = plain(behaviour.unit), largest_effect(record, q)
        yield from ("", f"### {plain(behaviour.name)}", "")
        yield (
            f"{signed(behaviour.value)} {unit} at the end of training (mean of"
            f" {count(behaviour.count)}). Above zero: the stage raised it."
        )
        yield ""
        yield from _row("Stage", "Updates", f"Effect [{unit}]", "± at 95 %", "How it is known")
        yield from _row("---", "---:", "---:", "---:", "---")
        for stage in record.stages:
            best = finite(best_of(stage, q))
            half = finite(stage.intervals[q]) if stage.intervals else None
            yield from _row(
                plain(stage.name),
                f"{count(stage.start)} to {count(stage.stop - 1)}",
                ABSENT if best is None else signed(best),
                ABSENT if half is None else half_width(half, largest),
                _grade(grade_of(stage, q), replayed=stage.replayed[q] is not None),
            )
    yield from ("", "### How this was found", "")
    yield (
        f"- Recorded run `{run.root_digest or 'unfinished, without a root digest'}`:"
        f" {plural(run.num_steps, 'update')}, {plural(run.num_parameters, 'trained parameter')},"
        f" {plain(run.optimizer)}."
    )
    if record.stopped:
        yield (
            f"- {record.used:.2f} of {record.budget:g} trainings were spent on replays and"
            f" placebos: {plain(record.stopped)}."
        )
    yield from (f"- {plain(said)}" for said in record.tradeoffs)
    yield from (f"- {plain(s.what)}: {plain(s.citation)}" for s in record.sources)
    if record.cautions:
        yield from ("", "### Cautions", "")
        yield from (f"- {plain(caution)}" for caution in record.cautions)


def plain(text: str) -> str:
    """``text`` with everything escaped that Markdown would act on."""
    return _ACTIVE.sub(lambda found: f"\\{found[0]}", text)


def _grade(grade: str, *, replayed: bool) -> str:
    return f"replayed, {grade}" if replayed and grade != "replayed" else grade


def _row(*cells: str) -> Sequence[str]:
    return (f"| {' | '.join(cells)} |",)
