"""Command line: `python -m experiments.projections`, the grids of this folder."""

import sys

from experiments.sweep.__main__ import main

GRIDS = ("projections",)

if __name__ == "__main__":
    sys.exit(main(None, "projections", *GRIDS))
