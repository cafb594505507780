"""Command line: `python -m experiments.pretrained`, the grids of this folder."""

import sys

from experiments.sweep.__main__ import main

GRIDS = ("tuning",)

if __name__ == "__main__":
    sys.exit(main(None, "pretrained", *GRIDS))
