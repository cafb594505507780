"""Tells what a training step needs, for any published model, allocating nothing.

Parameters, optimizer state, gradient accumulator, and the compiler's account of the
step that accumulates a micro-batch and of the step that applies the update.
"""

import sys

from experiments.common import command
from experiments.step_memory.config import Config


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status of `command.execute`."""
    name = "experiments.step_memory"
    return command.main(Config, f"{name}.run", f"python -m {name}", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
