"""Command line: `python -m experiments.benchmark`."""

import sys
from collections.abc import Sequence

import tyro

from experiments.benchmark.config import BenchmarkConfig
from experiments.command import execute

_DESCRIPTION = """\
Times one optimizer step on trees of GPT-2's shapes: optax's optimizers and ours, in one
process and in turns. Writes a JSON file and a picture."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: in place of the command line's own.

    Returns:
        The exit status: 0, or 2 for settings that make no sense.
    """
    config = tyro.cli(
        BenchmarkConfig,
        prog="python -m experiments.benchmark",
        description=_DESCRIPTION,
        args=arguments,
    )
    return execute(config, "experiments.benchmark.run")


if __name__ == "__main__":
    sys.exit(main())
