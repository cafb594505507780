"""Command line: `python -m experiments.claims`, the grids of this folder."""

import sys

from experiments.sweep.__main__ import main

GRIDS = ("gpt2", "t5", "accumulation", "momentum", "resampling")

if __name__ == "__main__":
    sys.exit(main(None, "claims", *GRIDS))
