"""Command line: `python -m experiments.micro_step`."""

import sys
from collections.abc import Sequence

import tyro

from experiments.common.command import execute
from experiments.micro_step.config import Config

_DESCRIPTION = """\
One micro-step of gradient accumulation, with full gradients and with gradients that are
sketches from the start. Blocks of published sizes with random weights, unrolled: the
operations of the gradient function by XLA's count, the buffers of a weight's shape in
its program, and the time of a micro-step in the middle of a cycle, all in turns."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: in place of the command line's own.

    Returns:
        The exit status: 0, or 2 for settings that make no sense.
    """
    config = tyro.cli(
        Config,
        prog="python -m experiments.micro_step",
        description=_DESCRIPTION,
        args=arguments,
    )
    return execute(config, "experiments.micro_step.measure")


if __name__ == "__main__":
    sys.exit(main())
