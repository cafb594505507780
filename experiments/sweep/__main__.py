"""Command line: `python -m experiments.sweep`."""

import sys

from experiments.common import command
from experiments.sweep.config import Config


def main(
    arguments: list[str] | None = None,
    config: type[Config] = Config,
    name: str = "sweep",
) -> int:
    """Runs the command line, of a question that is a set of grids too.

    Args:
        arguments: in place of the command line's own.
        config: with the grids of the question as their default.
        name: of the question.
    """
    return command.main(
        config,
        "experiments.sweep.run",
        f"python -m experiments.{name}",
        "Runs grids of short runs; those that stand in the results are not run again.",
        arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
