"""Trains a small GPT-2 on several devices that average gradients, or sketches.

Without and with error feedback; counts the bytes that are all-reduced. On a machine
without accelerators JAX_NUM_CPU_DEVICES=8 makes eight devices.
"""

import sys

from experiments.common import command
from experiments.reduction.config import Config


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status of `command.execute`."""
    name = "experiments.reduction"
    return command.main(Config, f"{name}.run", f"python -m {name}", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
