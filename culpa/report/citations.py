"""Links in citations: only web addresses and arXiv numbers, everything else stays text."""

from __future__ import annotations

import re
from typing import Final

_TARGET: Final = re.compile(
    r"(?P<url>https?://[A-Za-z0-9._~:/?#@!$&*+,;=%-]*[A-Za-z0-9/])"
    r"|(?P<arxiv>\barXiv[: ]\s?(?P<number>\d{4}\.\d{4,5}(?:v\d+)?))",
    re.IGNORECASE,
)


def linked(text: str) -> str:
    """``text`` escaped (as ``Markup``), its web addresses and arXiv numbers as links to click."""
    from markupsafe import Markup

    parts: list[Markup] = []
    end = 0
    for match in _TARGET.finditer(text):
        address = match["url"] or f"https://arxiv.org/abs/{match['number']}"
        parts.append(Markup.escape(text[end : match.start()]))
        parts.append(
            Markup('<a href="{}" rel="noreferrer noopener">{}</a>').format(address, match[0])
        )
        end = match.end()
    parts.append(Markup.escape(text[end:]))
    return Markup("").join(parts)
