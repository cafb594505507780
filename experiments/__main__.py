"""Command line of the main job: `python -m experiments`."""

import sys
from collections.abc import Sequence

from experiments.common import command
from experiments.main_job.config import Config

_DESCRIPTION = """\
Trains a small GPT-2 from scratch on the sources of Python's standard library: with
Adafactor and a full or a FLORA momentum, and with a full or a FLORA gradient
accumulator, FLORA at each of --ranks. Same model, same seed, same examples in the same
order. Nothing is downloaded. Ends with a table and two pictures; interrupted, the same
command continues from the last checkpoint."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    return command.main(
        Config,
        "experiments.main_job.run",
        "python -m experiments",
        _DESCRIPTION,
        arguments,
        interrupted="interrupted; the same command continues from the last checkpoint",
        distributed=True,
    )


if __name__ == "__main__":
    sys.exit(main())
