"""Command line: `python -m experiments.step_time`."""

import sys
from collections.abc import Sequence

import tyro

from experiments.common.command import execute
from experiments.step_time.config import BenchmarkConfig

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
        prog="python -m experiments.step_time",
        description=_DESCRIPTION,
        args=arguments,
    )
    return execute(config, "experiments.step_time.run")


if __name__ == "__main__":
    sys.exit(main())
