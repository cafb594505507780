"""Runs grids of short runs; those that stand in the results are not run again."""

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
    names = "experiments.sweep.run", f"python -m experiments.{name}"
    default = Config(grids) if grids else None
    return command.main(Config, *names, __doc__, arguments, default=default)


if __name__ == "__main__":
    sys.exit(main())
