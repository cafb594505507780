"""Configuration of the documentation site.

From the root of the clone, with the ``docs`` extra installed; no network is needed:

  python -m sphinx -W --keep-going -q -b html docs build/docs

With FLORA_JAX_DOCS_ONLINE set, names of jax, optax and Python link to their own sites,
whose inventories are fetched for it.
"""

import os
import re

from sphinx.util.inspect import TypeAliasForwardRef

project = "flora_jax"
author = "the flora_jax authors"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",  # Fetched when a page is read, not when it is built.
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
html_theme = "sphinx_book_theme"
html_title = "flora_jax"
html_theme_options = {"show_toc_level": 2}
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
# Shown by these names, not by the unions that they stand for.
autodoc_type_aliases = {
    "jax.typing.ArrayLike": "jax.typing.ArrayLike",
    "optax.ScalarOrSchedule": "optax.ScalarOrSchedule",
    "KeyData": "KeyData",
    "KeyLike": "KeyLike",
    "LeafMask": "LeafMask",
    "PyTree": "PyTree",
    "RankSpec": "RankSpec",
}
autodoc_preserve_defaults = True
TypeAliasForwardRef.__repr__ = lambda self: self.name  # What unions show.
autosummary_generate = False  # The tables link to entries of the same page.
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = True
# Offline builds must pass with warnings as errors, and have no inventory to fetch.
if os.environ.get("FLORA_JAX_DOCS_ONLINE"):
    intersphinx_mapping = {
        "jax": ("https://docs.jax.dev/en/latest", None),
        "optax": ("https://optax.readthedocs.io/en/latest", None),
        "python": ("https://docs.python.org/3", None),
    }


def setup(app):
    """Lets the pages link to Markdown files that lie outside of the site."""
    app.connect("source-read", _link_files)


def _link_files(app, docname, source):
    # MyST would look for a page of the site; "path:" makes it a download.
    outside = r"\]\(((?:\.\./)+(?:experiments|notebooks)/[^)]*\.md)\)"
    source[0] = re.sub(outside, r"](path:\1)", source[0])
