"""Command line: `python -m experiments.step_memory`."""

import sys
from collections.abc import Sequence

import tyro

from experiments.common.command import execute
from experiments.step_memory.config import Config

_DESCRIPTION = """\
Tells what a training step needs, for any published model and without allocating it:
parameters, optimizer state, gradient accumulator, and the compiler's account of the
step that accumulates a micro-batch and of the step that applies the update."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: in place of the command line's own.

    Returns:
        The exit status: 0, or 2 for settings that make no sense.
    """
    config = tyro.cli(
        Config,
        prog="python -m experiments.step_memory",
        description=_DESCRIPTION,
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return execute(config, "experiments.step_memory.run")


if __name__ == "__main__":
    sys.exit(main())
