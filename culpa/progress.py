"""Progress, injected: the library reports through this protocol and is silent by default."""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """What long jobs call. ``culpa.cli`` shows it with Rich; a user may show it any other way."""

    def start(self, what: str, total: int) -> None:
        """A job of ``total`` equal units begins."""
        ...

    def advance(self, units: int = 1) -> None:
        """So many units of the job begun last are done."""
        ...

    def finish(self) -> None:
        """The job begun last is done (or was abandoned)."""
        ...


class Silent:
    """The default: says nothing."""

    def start(self, what: str, total: int) -> None:
        """Say nothing."""

    def advance(self, units: int = 1) -> None:
        """Say nothing."""

    def finish(self) -> None:
        """Say nothing."""
