"""Command line: `python -m experiments.family`, the grids of this folder."""

import sys

from experiments.sweep.__main__ import main

GRIDS = (
    *("pareto", "longer", "ablations", "bases", "polar", "polar_longer", "codes"),
    *("rows", "rounding", "rounding_llama", "rounding_llama_low"),
)

if __name__ == "__main__":
    sys.exit(main(None, "family", *GRIDS))
