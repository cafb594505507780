"""Command line: `python -m experiments.projections`, the grids of this folder."""

import dataclasses
import sys

from experiments.sweep import config
from experiments.sweep.__main__ import main


@dataclasses.dataclass(frozen=True)
class Config(config.Config):
    """The grids of this folder, unless others are named."""

    grids: tuple[str, ...] = ("projections",)


if __name__ == "__main__":
    sys.exit(main(None, Config, "projections"))
