"""Command line: `python -m experiments.sweep`."""

import sys

import tyro

from experiments.sweep.run import main

if __name__ == "__main__":
    sys.exit(tyro.cli(main, prog="python -m experiments.sweep"))
