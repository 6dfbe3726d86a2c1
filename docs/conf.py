"""Sphinx settings. `make docs` builds the site into docs/_build/html; it requests nothing from other hosts."""

from __future__ import annotations

from importlib.metadata import version as installed
from pathlib import Path

project = "gxr-batch"
author = "the gxr-batch authors"
project_copyright = "the gxr-batch authors; Apache License 2.0"
version = release = installed("gxr-batch")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.graphviz"]
exclude_patterns = ["_build"]

# Headings get the anchors that GitHub gives them, so that links work in both places.
myst_heading_anchors = 4

autodoc_typehints = "description"
autodoc_typehints_format = "short"
default_role = "code"  # docstrings are Markdown: `name` is code
nitpick_ignore_regex = [("py:.*", ".*")]  # types of other projects are not linked: that would need the network

html_theme = "furo"
html_title = "gxr-batch"
html_copy_source = html_show_sourcelink = False
html_show_sphinx = False
html_show_search_summary = False  # needs a web server; the site is opened from a disk
html_search_scorer = str(Path(__file__).with_name("search_scorer.js"))

graphviz_output_format = "svg"
