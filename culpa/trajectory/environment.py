"""What bitwise replay depends on: captured as text, compared field by field, set where it can be.

The fields are in environment_fields.py, and docs/environment.md gives their reasons.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from torch import Tensor

from culpa.errors import EnvironmentDifference, IntegrityError
from culpa.trajectory import environment_fields as fields

UNSET = "unset"


@dataclass(frozen=True)
class Difference:
    """One field that is not as it was recorded; ``matters`` says whether it can change a bit."""

    name: str
    recorded: str
    here: str
    matters: bool

    def __str__(self) -> str:
        return f"{self.name}: recorded {self.recorded}, here {self.here}"


def capture(tensors: Collection[Tensor] = ()) -> dict[str, str]:
    """The facts of this process that can change the bits of a training step.

    Args:
        tensors: the model's, for the device they are on; none: the CPU.
    """
    facts = {f.name: f.text() for f in fields.FIELDS}
    return facts | fields.devices(tensors) | fields.variables()


def compare(recorded: Mapping[str, str], here: Mapping[str, str]) -> list[Difference]:
    """Every field that differs.

    A field that the record does not have is one that an older culpa did not know: a difference in
    it cannot be told. Variables are recorded only where they are set, so a missing one is unset.
    """
    device = recorded.get("device", "cpu")
    known = [n for n in here if n in recorded or n.startswith("$")]
    found: list[Difference] = []
    for name in sorted({*recorded, *known}):
        missing = UNSET if name.startswith("$") else "nothing"
        there, now = recorded.get(name, missing), here.get(name, missing)
        if there != now:
            found.append(Difference(name, there, now, fields.matters(name, device)))
    return found


def require_same(recorded: Mapping[str, str], here: Mapping[str, str], where: str) -> None:
    """Raise ``EnvironmentDifference`` listing every field that differs and can change a bit."""
    wrong = [str(d) for d in compare(recorded, here) if d.matters]
    if wrong:
        raise EnvironmentDifference(
            f"this process is not like the one that recorded {where}, so nothing in it need be bit"
            f" for bit what was recorded: {'; '.join(wrong)}. Recreate that environment (on the"
            " command line, culpa sets by itself what can be set), or pass allow_drift=True"
            " (--allow-drift), which measures the drift and says so with every number."
        )


@contextmanager
def as_recorded(recorded: Mapping[str, str]) -> Generator[None]:
    """Set what a running process can (threads, determinism, precision, ...); restore after.

    Only what differs is touched.

    Raises:
        IntegrityError: if a recorded setting is none that exists.
    """
    changes = [
        (f.write, f.read(), _value(f, recorded[f.name]))
        for f in fields.FIELDS
        if f.write and f.name in recorded and recorded[f.name] != f.text()
    ]
    try:
        for write, _, wanted in changes:
            with suppress(RuntimeError):  # a device that lacks it: it remains a difference
                write(wanted)
        yield
    finally:
        for write, before, _ in reversed(changes):
            write(before)


def _value(field: fields.Field, text: str) -> object:
    try:
        return field.value(text)
    except ValueError as error:
        expected = ", ".join(field.choices) or f"a number from 1 to {fields.MOST_THREADS}"
        raise IntegrityError(
            f"the record says {field.name}: {text[:80]!r}, which is none of {expected}. The folder"
            " was changed, or a newer culpa made it."
        ) from error
