"""Configuration of the documentation site.

From the clone's root, with the ``docs`` extra installed and no network:

  python -m sphinx -W --keep-going -b html flora_jax/docs build/docs

Sphinx with MyST and the book theme, as jax, flax, optax and chex have it: autodoc reads
the docstrings that the package already has. mkdocs-material, the other candidate, takes
no new features any more.
"""

project = "flora_jax"
author = "the flora_jax authors"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",  # Fetched when a page is read, not when it is built.
    "sphinx.ext.napoleon",
]
html_theme = "sphinx_book_theme"
html_title = "flora_jax"
html_theme_options = {"show_toc_level": 2}
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # The docstrings say more, in fewer words.
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
