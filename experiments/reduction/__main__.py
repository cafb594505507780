"""Command line: `python -m experiments.reduction`."""

import sys

import tyro

from experiments.common.command import execute
from experiments.reduction.run import Config

if __name__ == "__main__":
    settings = tyro.cli(Config, prog="python -m experiments.reduction")
    sys.exit(execute(settings, "experiments.reduction.run"))
