"""How Sphinx builds this site: `make docs`. No network is needed, for building or for reading."""

from __future__ import annotations

import sys
from pathlib import Path

from culpa import __version__

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS / "_ext"))

project = "culpa"
release = version = __version__
language = "en"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "facade", "mathml"]
exclude_patterns = ["_build"]

# The pages are plain Markdown, read on code hosts too.
myst_enable_extensions = ["dollarmath", "attrs_inline", "deflist"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]  # several names may share a line
toc_object_entries_show_parents = "hide"

# Other projects' names are not looked up: that would need a network.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!culpa\.[a-z]).*"),
    # Internal types that signatures of protocols name.
    (
        r"py:class",
        r"culpa\..*\.(Batch|LocalLoss|Outcome|RandomState|Ranks|StagedProblem|Task|Transition|Updates)",
    ),
]

html_theme = "furo"
html_title = f"culpa {release}"
html_static_path = ["_static"]
html_css_files = ["culpa.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
