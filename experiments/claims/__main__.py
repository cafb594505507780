"""Command line: `python -m experiments.claims`, the grids of this folder."""

import dataclasses
import sys

from experiments.sweep import config
from experiments.sweep.__main__ import main


@dataclasses.dataclass(frozen=True)
class Config(config.Config):
    """The grids of this folder, unless others are named."""

    grids: tuple[str, ...] = ("gpt2", "t5", "accumulation", "momentum", "resampling")


if __name__ == "__main__":
    sys.exit(main(None, Config, "claims"))
