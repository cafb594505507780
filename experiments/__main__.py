"""Command line: `python -m experiments`."""

import sys
from collections.abc import Sequence

import tyro

from experiments.common.command import execute
from experiments.main_job.config import Config

_DESCRIPTION = """\
Trains a small GPT-2 from scratch on the sources of Python's standard library, four
times: with Adafactor and a full or a FLORA momentum, and with a full or a FLORA
gradient accumulator. Same model, same seed, same examples in the same order. Nothing is
downloaded. Ends with a table, two pictures, and a checkpoint to --resume from."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: in place of the command line's own.

    Returns:
        The exit status: 0, 1 if a training diverged, 2 for settings that make no sense,
        130 if it was interrupted.
    """
    config = tyro.cli(
        Config,
        prog="python -m experiments",
        description=_DESCRIPTION,
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    return execute(
        config,
        "experiments.main_job.run",
        "interrupted; --resume continues from the last checkpoint",
        distributed=True,
    )


if __name__ == "__main__":
    sys.exit(main())
