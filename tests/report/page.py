"""Reading a report back: its elements, their texts, and what they would load."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "input", "hr", "source", "base", "wbr", "col"}
LOADING = {"src", "srcset", "poster", "data", "action", "formaction", "background", "ping", "cite"}


@dataclass(eq=False)
class Element:
    tag: str
    attributes: dict[str, str]
    parents: tuple[Element, ...]
    parts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return " ".join("".join(self.parts).split())

    def inside(self, tag: str, **attributes: str) -> bool:
        return any(
            p.tag == tag and attributes.items() <= p.attributes.items()
            for p in (self, *self.parents)
        )


class Page(HTMLParser):
    """Every element of a document in order. An element's text is that of all below it."""

    def __init__(self, document: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[Element] = []
        self._open: list[Element] = []
        self.feed(document)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        while self._open and self._open[-1].tag in {"td", "tr"} and self._closed_by(tag):
            self._open.pop()
        element = Element(tag, {k: v or "" for k, v in attrs}, tuple(self._open))
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def _closed_by(self, tag: str) -> bool:
        """HTML lets ``</td>`` and ``</tr>`` be left out before the next cell and row."""
        return tag == "tr" or (tag in {"td", "th"} and self._open[-1].tag == "td")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open[-1].tag in {"td", "tr"} and self._open[-1].tag != tag:
            self._open.pop()
        assert self._open, f"</{tag}> closes nothing"
        assert self._open[-1].tag == tag, f"</{tag}> closes <{self._open[-1].tag}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.parts.append(data)

    def all(self, tag: str, **attributes: str) -> list[Element]:
        return [
            e for e in self.elements if e.tag == tag and attributes.items() <= e.attributes.items()
        ]

    def one(self, tag: str, **attributes: str) -> Element:
        (found,) = self.all(tag, **attributes)
        return found

    def below(self, parent: Element, tag: str) -> list[Element]:
        return [e for e in self.elements if e.tag == tag and parent in e.parents]

    @property
    def skeleton(self) -> list[tuple[str, tuple[str, ...]]]:
        """Tags and names of attributes: what a text must not be able to change."""
        return [(e.tag, tuple(e.attributes)) for e in self.elements]
