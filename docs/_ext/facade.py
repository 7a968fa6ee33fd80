"""Docstrings as the API pages show them: names of the façade become links."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import culpa

SHOWN_AS = {"culpa.progress": "culpa.progress.Progress"}
"""A module named in docstrings -> what of it has a place on the API pages."""
PLACES = ("culpa", "culpa.behaviours")
"""Where users import from: a class is documented there, wherever it is defined."""
MADE_BY_USERS = {
    *("Problem", "Behaviour", "CheckpointStage", "Durability", "Smoothing", "RecorderCallback"),
    *("Plan", "Processes", "Ray", "Grown", "InMemory", "OnCpu", "OnDisk"),
    *("Thinned", "Every", "All", "AtStages", "Budget"),
    *("Exact", "GaussNewton", "LayerWise", "BlockWise", "Subset", "Secant", "Krylov", "Identity"),
}
"""Classes whose constructors users call; of all others culpa makes the instances."""
CODE = re.compile(r"``((?:culpa\.)?(?:behaviours\.)?(\w+)(?:\.\w+)*)(\([^`]*\))?``")
PAGE = re.compile(r"\bdocs/([\w/]+)\.md")


def link(found: re.Match[str]) -> str:
    """Code that begins with a public name, as a link to that name."""
    code, first, call = found[1], found[2], found[3] or ""
    target = SHOWN_AS.get(code)
    if target is None:
        public = first in culpa.__all__ and first != "behaviours"
        if not public or not (code.startswith("culpa.") or first[0].isupper()):
            return found[0]
        target = f"culpa.{first}"
    return f":py:obj:`{code}{call} <{target}>`"


def prepare(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Before napoleon: make links, and keep it from reading "Scores. Cost" as a type."""
    section = "Returns:" if what in ("attribute", "property") else ""
    for at, line in enumerate(lines):
        if re.fullmatch(r"(Args|Returns|Yields|Raises|Attributes):", line.strip()):
            section = line.strip()
        elif section in ("Returns:", "Yields:") and line.strip():
            indent = len(line) - len(line.lstrip())
            lines[at], section = f"{line[:indent]}: {line[indent:]}", ""
        if section == "Raises:":
            lines[at] = line = re.sub(r"^( *)and (whatever )", r"\1CulpaError: \2", line)
        lines[at] = PAGE.sub(r":doc:`/\1`", CODE.sub(link, lines[at]))


def sign(
    app: Sphinx, what: str, name: str, obj: object, options: object, signature: str, returns: str
) -> tuple[str, None] | None:
    """No signature where nobody calls the constructor."""
    made = what == "class" and name.rpartition(".")[2] not in MADE_BY_USERS
    return ("", None) if made else None


def resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.reference | None:
    """A name where it is defined (``culpa.problem.Problem``) -> where users import it from."""
    target = str(node.get("reftarget", ""))
    if node.get("refdomain") != "py":
        return None
    domain: Any = env.get_domain("py")
    last = target.rpartition(".")[2]
    for place in PLACES:
        known = domain.objects.get(f"{place}.{last}")
        if known is not None:
            return domain.resolve_xref(
                env, node["refdoc"], app.builder, "obj", f"{place}.{last}", node, content
            )
    return None


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect all three."""
    app.connect("autodoc-process-signature", sign)
    app.connect("autodoc-process-docstring", prepare, priority=400)
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
