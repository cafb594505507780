"""Command line: `python -m experiments.family`, the grids of this folder."""

import dataclasses
import sys

from experiments.sweep import config
from experiments.sweep.__main__ import main


@dataclasses.dataclass(frozen=True)
class Config(config.Config):
    """The grids of this folder, unless others are named."""

    grids: tuple[str, ...] = ("pareto", "longer", "ablations")


if __name__ == "__main__":
    sys.exit(main(None, Config, "family"))
