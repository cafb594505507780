"""One training on a screen each, for the usual ways to hold parameters."""
