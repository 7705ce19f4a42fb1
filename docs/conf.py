"""Configuration of the documentation: `make docs` builds it offline with warnings as errors."""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path[:0] = [str(DOCS / "_ext"), str(DOCS.parent)]

from pipeline_steps import __version__  # noqa: E402

project = "Seeing Sound"
author = "The Seeing Sound authors"
copyright = f"2026, {author}"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "code_reference",
]
exclude_patterns = ["_build", "_ext", "_static"]
source_suffix = {".md": "markdown"}
default_role = "literal"  # docstrings mark code by single backticks
suppress_warnings = ["ref.python"]  # attributes of several classes have equal names

myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True

copybutton_exclude = ".linenos, .gp"

html_theme = "furo"
html_title = f"Seeing Sound {version}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_theme_options = {"navigation_with_keys": True}
html_copy_source = False
