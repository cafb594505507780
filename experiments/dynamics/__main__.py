"""Command line: `python -m experiments.dynamics`."""

import sys

import tyro

from experiments.common.command import execute
from experiments.dynamics.run import Config

if __name__ == "__main__":
    settings = tyro.cli(Config, prog="python -m experiments.dynamics")
    sys.exit(execute(settings, "experiments.dynamics.run", "interrupted; run it again"))
