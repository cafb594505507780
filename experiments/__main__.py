"""Trains a small GPT-2 from scratch on the sources of Python's standard library.

With Adafactor and a full or a FLORA momentum, and with a full or a FLORA gradient
accumulator, FLORA at each of --ranks. Same model, same seed, same examples in the same
order. Nothing is downloaded. Ends with a table and two pictures; interrupted, the same
command continues from the last checkpoint.
"""

import sys
from collections.abc import Sequence

from experiments.common import command
from experiments.main_job.config import Config


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status of `command.execute`."""
    return command.main(
        Config,
        arguments,
        module="experiments.main_job.run",
        prog="python -m experiments",
        description=__doc__,
        resumable=True,
    )


if __name__ == "__main__":
    sys.exit(main())
