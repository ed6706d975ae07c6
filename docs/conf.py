"""How Sphinx makes a site of these pages: `sphinx-build -W docs site`, where a link that leads nowhere is an error."""

import re
from importlib.metadata import version as version_of

project = "dinat"
copyright = "the authors of dinat, MIT licence"
version = release = version_of("dinat")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = "dinat"
html_show_sourcelink = False

suppress_warnings = ["misc.highlighting_failure"]  # `console` blocks hold outputs, which no lexer knows
myst_heading_anchors = 3
default_role = "code"  # a docstring's `name` is code, as in Markdown
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}


def escape_shapes(app, what, name, obj, options, lines: list[str]) -> None:
    """The star of a shape (batch, *sides) is no emphasis."""
    lines[:] = [re.sub(r"\*(?=\w)", r"\\*", line) for line in lines]


def setup(app) -> None:
    app.connect("autodoc-process-docstring", escape_shapes, priority=400)  # before napoleon reads the sections
