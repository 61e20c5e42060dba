"""Sphinx's configuration. `make docs` builds the pages into ``build/docs``; a link that leads nowhere fails the build."""

from sglang_dsv4 import __version__

project = "sglang-dsv4"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"sglang-dsv4 {__version__}"
# It would make one dash of the two before an option.
smartquotes = False
# Headings down to this level can be linked to, as page.md#heading.
myst_heading_anchors = 3
# What docstrings put in single backticks is a name of ours, where it is one.
default_role = "py:obj"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Equation"]
