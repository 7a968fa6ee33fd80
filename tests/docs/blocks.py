"""Code blocks of a page, and what running them means.

- ``python``: executed, all blocks of a page in order in one namespace, in an empty folder. A block
  whose first line is ``# name.py`` is that file: it is written there and runs when a command or an
  import names it.
- ``sh``: its lines ``python name.py`` and ``culpa ...`` are executed, the latter in this process,
  unless they hold a placeholder in capitals (``culpa inspect RUN``). Other lines (``pip``,
  ``make``) are for the reader.
- ``text`` right after either: what is printed. Each of its lines must be printed, in their order;
  a line ``...`` stands for any others. Numbers may differ a little.
"""

from __future__ import annotations

import re
import runpy
import shlex
from dataclasses import dataclass
from typing import Any

import pytest

from culpa.cli.app import app

FENCE = re.compile(r"^(```+)(\S*)[^\n]*\n(.*?)^\1 *$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^###? +(.+?) *$", re.MULTILINE)
FILE = re.compile(r"# ([a-z_]+\.py)\n")
PLACEHOLDER = re.compile(r"\b[A-Z]{3,}\b")
NUMBER = re.compile(r"[+-]?\d[\d.]*,?")
RELATIVE, ABSOLUTE = 0.02, 0.001
"""Another processor rounds differently, and training carries that on."""


@dataclass(frozen=True)
class Block:
    """One fenced block. ``line``: of the page, that of its first line of code."""

    language: str
    code: str
    line: int
    section: str
    follows: bool  # only empty lines stand between the block before and this one

    @property
    def file(self) -> str | None:
        """The name of the file that the block is, if it is one."""
        named = FILE.match(self.code) if self.language == "python" else None
        return named[1] if named else None

    @property
    def commands(self) -> list[list[str]]:
        """The commands of a shell block that can be executed here, as words."""
        if self.language != "sh":
            return []
        lines = re.sub(r"\\\n\s*", "", self.code).splitlines()
        found = [shlex.split(line, comments=True) for line in lines if not PLACEHOLDER.search(line)]
        return [words for words in found if words and (words[0] == "culpa" or is_script(words))]


def is_script(words: list[str]) -> bool:
    """Whether this is ``python name.py``."""
    return words[0] == "python" and len(words) == 2 and words[1].endswith(".py")


def blocks_of(page: str) -> list[Block]:
    """The fenced blocks of a page in Markdown, in order."""
    found: list[Block] = []
    end = 0
    for fence in FENCE.finditer(page):
        sections = HEADING.findall(page[: fence.start()])
        section = sections[-1] if sections else ""
        line = page.count("\n", 0, fence.start(3)) + 1
        follows = not page[end : fence.start()].strip() and end > 0
        found.append(Block(fence[2], fence[3], line, section, follows))
        end = fence.end()
    return found


def execute(block: Block, name: str, names: dict[str, Any]) -> None:
    """Run one block; ``names``: the page's namespace, ``name``: of the page, for tracebacks."""
    if block.language == "python" and block.file is None:
        code = "\n" * (block.line - 1) + block.code
        try:
            exec(compile(code, name, "exec", dont_inherit=True), names)
        except SystemExit as stop:  # a script's way to say how it went
            if stop.code:
                raise
    for words in block.commands:
        if words[0] == "python":
            runpy.run_path(words[1], run_name="__main__")
        else:
            app(words[1:], standalone_mode=False)


def words_of(line: str) -> list[str]:
    """Words and numbers of a printed line, without frames of tables."""
    line = line.replace("\N{MINUS SIGN}", "-").translate(dict.fromkeys(map(ord, "|│─━┃"), " "))
    return [word for word in line.split() if set(word) - set("+-") or word == "-"]


def same(there: str, here: str) -> bool:
    """Whether two words are equal, or two numbers nearly so."""
    if NUMBER.fullmatch(there) and NUMBER.fullmatch(here):
        number = float(there.rstrip(",").rstrip("."))
        off = abs(float(here.rstrip(",").rstrip(".")) - number)
        return off <= RELATIVE * abs(number) + ABSOLUTE
    return there == here


def require_printed(promised: Block, printed: str, name: str) -> None:
    """Fail unless the lines of a text block are among what was printed, in order."""
    rest = [words_of(line) for line in printed.splitlines()]
    for line in promised.code.splitlines():
        wanted = words_of(line)
        if not wanted or line.strip() == "...":
            continue
        for at, got in enumerate(rest):
            if len(got) == len(wanted) and all(map(same, wanted, got)):
                del rest[: at + 1]
                break
        else:
            pytest.fail(f"{name}:{promised.line}: not printed: {line!r}; but:\n{printed}")
