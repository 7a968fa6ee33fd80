"""Formulas as MathML: the browser draws them, so pages need neither JavaScript nor a network."""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx


def mathml(node: nodes.Node, display: str) -> str:
    """A formula node as a ``<math>`` element, its LaTeX kept beside it for screen and search."""
    latex = node.astext()
    made: str = convert(latex, display=display)
    return made.replace("<math ", f'<math alttext="{escape(latex, {chr(34): "&quot;"})}" ', 1)


def visit_inline(self: Any, node: nodes.Element) -> None:
    """A formula in a line of text."""
    self.body.append(mathml(node, "inline"))
    raise nodes.SkipNode


def visit_block(self: Any, node: nodes.Element) -> None:
    """A formula on a line of its own, with its number at the right if it has a label."""
    self.body.append(self.starttag(node, "div", CLASS="math"))
    if node.get("number"):
        self.body.append(f'<span class="eqno">({node["number"]})')
        self.add_permalink_ref(node, "Link to this equation")
        self.body.append("</span>")
    self.body.append(f'<div class="formula">{mathml(node, "block")}</div></div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer; ``html_math_renderer = "mathml"`` chooses it."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
