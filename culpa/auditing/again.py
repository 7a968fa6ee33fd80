"""Reproducing an audit: the same run, options and behaviours must give the same numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator

from culpa.auditing.record import AuditRecord
from culpa.errors import IntegrityError, OptionError

TOLERANCE = 1e-6
"""Relative to the largest effect on the behaviour: sums of floats in another order stay below."""


def options_of(record: AuditRecord) -> tuple[float, str, bool]:
    """Budget, counterfactual and drift allowed: what an audit was asked for.

    Raises:
        OptionError: if a propagator of the user's own was named, which a record cannot hold.
    """
    asked = record.options.get("asked for", CHOSEN)
    if asked != CHOSEN:
        raise OptionError(
            f"this audit was made with propagator={asked}: reproduce it in Python, with"
            " culpa.audit(..., propagator=...), and compare with culpa.auditing.again.compare."
        )
    return record.budget, record.run.counterfactual, record.options.get("allow_drift") == "True"


CHOSEN = "the library's choice"
"""The propagator of an audit that named none."""


def require_same_run(record: AuditRecord, root_digest: str) -> None:
    """Raise ``IntegrityError`` unless the audit is of the run with this root digest."""
    if record.run.root_digest != root_digest:
        raise IntegrityError(
            f"the audit is of the run {record.run.name!r} with root digest"
            f" {record.run.root_digest}; this run has {root_digest}. Give the run it was made of."
        )


def compare(old: AuditRecord, new: AuditRecord) -> list[str]:
    """What differs between two audits of one run, one line each; empty if they agree.

    Verdicts, grades and settledness must be equal; numbers to ``TOLERANCE``. Times, the version of
    culpa and the date may differ.
    """
    return list(_differences(old, new))


def _differences(old: AuditRecord, new: AuditRecord) -> Iterator[str]:
    names = [(b.name, b.unit, b.count) for b in old.behaviours]
    if names != [(b.name, b.unit, b.count) for b in new.behaviours]:
        yield f"behaviours: {names} then, {[b.name for b in new.behaviours]} now"
        return
    spans = [(s.name, s.start, s.stop) for s in old.stages]
    if spans != [(s.name, s.start, s.stop) for s in new.stages]:
        yield f"stages: {spans} then, {[s.name for s in new.stages]} now"
        return
    for q, (a, b) in enumerate(zip(old.behaviours, new.behaviours, strict=True)):
        scale = max((abs(_best(s.replayed[q], s.effects[q])) for s in old.stages), default=0.0)
        if not _close(a.value, b.value, scale):
            yield f"{a.name}: {a.value:.9g} then, {b.value:.9g} now"
        for s, t in zip(old.stages, new.stages, strict=True):
            where = f"stage {s.name!r} on {a.name}"
            for what in ("scores", "effects", "replayed"):
                then, now = getattr(s, what)[q], getattr(t, what)[q]
                if (then is None) != (now is None):
                    yield f"{where}: {what} {then} then, {now} now"
                elif then is not None and not _close(then, now, scale):
                    yield f"{where}: {what} {then:.9g} then, {now:.9g} now"
            if s.grades[q : q + 1] != t.grades[q : q + 1]:
                yield f"{where}: grade {s.grades[q]} then, {t.grades[q]} now"
    if old.settled != new.settled or old.stopped != new.stopped:
        yield f"stopped because {old.stopped} then, because {new.stopped} now"


def _best(replayed: float | None, effect: float) -> float:
    return effect if replayed is None else replayed


def _close(a: float, b: float, scale: float) -> bool:
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    return abs(a - b) <= TOLERANCE * max(scale, abs(a))
