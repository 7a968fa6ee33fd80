"""The record as the views need it: consistent, and with nothing invisible in its texts."""

from __future__ import annotations

import msgspec

from culpa.auditing.record import AUDIT_FORMAT, AuditRecord
from culpa.errors import OptionError
from culpa.report.numbers import visible_everywhere


def checked(record: AuditRecord) -> AuditRecord:
    """A copy of ``record`` whose texts are safe to look at (``numbers.visible``).

    Raises:
        OptionError: another format, or lists that do not fit together; the message names them.
    """
    if record.format != AUDIT_FORMAT:
        raise OptionError(
            f"the audit record has format {record.format}, this version of culpa shows "
            f"{AUDIT_FORMAT}. Use the version of culpa that wrote it ({record.culpa_version})."
        )
    wanted = len(record.behaviours)
    for stage in record.stages:
        for what in ("scores", "effects", "replayed"):
            _same(f"stage {stage.name!r}: {what}", len(getattr(stage, what)), wanted, "behaviours")
        for what in ("intervals", "floors", "grades", "sums"):
            if getattr(stage, what):  # as far as known
                _same(
                    f"stage {stage.name!r}: {what}", len(getattr(stage, what)), wanted, "behaviours"
                )
    for placebo in record.placebos:
        _same(f"placebo at {placebo.at}: effects", len(placebo.effects), wanted, "behaviours")
    updates = record.updates
    for k, row in enumerate(updates.scores):
        _same(f"update {k}: scores", len(row), wanted, "behaviours")
    for what in ("growth", "displacement", "grades", "learning_rates"):
        given = len(getattr(updates, what))
        _same(f"updates: {what}", given, len(updates.scores), "updates with scores")
    return msgspec.convert(visible_everywhere(msgspec.to_builtins(record)), AuditRecord)


def _same(what: str, given: int, wanted: int, of_what: str) -> None:
    if given != wanted:
        raise OptionError(
            f"the audit record contradicts itself: {what} has {given} entries for {wanted} "
            f"{of_what}. Write one entry for each."
        )
