"""Fetching a public file, only when asked: checked by its digest before it has its name."""

from __future__ import annotations

import hashlib
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from culpa.errors import IntegrityError, OptionError
from culpa.trajectory.files import write_durably

TIMEOUT = 60.0
"""Seconds without an answer."""


def fetch(addresses: tuple[str, ...], md5: str, target: Path) -> Path:
    """Write the file at the first address that answers to ``target``.

    Args:
        addresses: mirrors of one file.
        md5: its digest as its publishers give it: against damage, not against an attacker.
        target: written only if the digest is right.

    Raises:
        OptionError: if no address answers.
        IntegrityError: if what came is another file.
    """
    failures: list[str] = []
    for address in addresses:
        try:
            with urlopen(address, timeout=TIMEOUT) as answer:  # noqa: S310 (ours, all https)
                content: bytes = answer.read()
        except (URLError, OSError) as error:
            failures.append(f"{address} ({error})")
            continue
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != md5:
            raise IntegrityError(
                f"{address} gave a file with MD5 {found}, expected {md5}. Nothing was kept."
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        write_durably(target, content)
        return target
    raise OptionError(
        f"{target.name} could not be downloaded: {'; '.join(failures)}. Fetch it by hand into"
        f" {target.parent}."
    )
