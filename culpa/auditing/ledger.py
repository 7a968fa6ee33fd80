"""The ledger of an audit: every result on disk as it comes, so that nothing is computed twice.

A folder holds one file of JSON lines, each with the key of its audit, the name of a result and the
result. The key is a digest of everything a result depends on, so results of another run, of other
behaviours or options, or of another version of culpa are never taken for this audit's. A line that
an interruption cut short is no line.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from blake3 import blake3

from culpa.errors import StoreError

RESULTS = "results.jsonl"
"""The file in the folder."""
Result = TypeVar("Result")


class Line(msgspec.Struct, frozen=True):
    """One kept result."""

    key: str
    name: str
    result: msgspec.Raw


class Ledger:
    """Results by name, kept in ``folder`` if there is one.

    Args:
        folder: made when the first result comes; ``None``: nothing is kept.
        facts: what the results depend on, as plain data.

    Raises:
        StoreError: if the folder holds a file that cannot be read.
    """

    def __init__(self, folder: Path | None, facts: Any) -> None:
        self.folder = folder
        self.key = blake3(msgspec.json.encode(facts)).hexdigest()
        self.reused = 0
        self._known = {} if folder is None else _read(folder / RESULTS, self.key)

    def __contains__(self, name: object) -> bool:
        """Whether the result by that name is known."""
        return name in self._known

    def get(self, name: str, kind: type[Result], make: Callable[[], Result]) -> Result:
        """The result by that name: the kept one or, where there is none, a new one, then kept."""
        if name in self._known:
            self.reused += 1
            return msgspec.json.decode(self._known[name], type=kind)
        made = make()
        self._keep(name, made)
        return made

    def _keep(self, name: str, result: Any) -> None:
        encoded = msgspec.json.encode(result)
        self._known[name] = encoded
        if self.folder is None:
            return
        line = msgspec.json.encode(Line(self.key, name, msgspec.Raw(encoded)))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # A line break first: what an interruption left of a line before ends there.
            with (self.folder / RESULTS).open("ab") as file:
                file.write(b"\n" + line + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StoreError(f"cannot keep results in {self.folder}: {error}.") from error


def _read(path: Path, key: str) -> dict[str, bytes]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error}.") from error
    found: dict[str, bytes] = {}
    for text in data.splitlines():
        try:
            line = msgspec.json.decode(text, type=Line)
        except msgspec.MsgspecError:
            continue
        if line.key == key:
            found[line.name] = bytes(line.result)
    return found
