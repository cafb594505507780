"""Runs grids of short runs; those already in the results are not repeated."""

import sys

from experiments.common import command
from experiments.sweep.config import Config


def main(arguments: list[str] | None = None, name: str = "sweep", *grids: str) -> int:
    """Runs the command line, of a question that is a set of grids too.

    Args:
        arguments: in place of the command line's own.
        name: of the question.
        *grids: those of the question, unless others are named.
    """
    return command.main(
        Config,
        arguments,
        module="experiments.sweep.run",
        prog=f"python -m experiments.{name}",
        description=__doc__,
        default=Config(grids) if grids else None,
    )


if __name__ == "__main__":
    sys.exit(main())
