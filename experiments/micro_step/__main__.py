"""One micro-step of gradient accumulation, with full and with sketched gradients.

Blocks of published sizes with random weights, unrolled: FLOPs of the gradient function
by XLA's count, the buffers of a weight's shape in its program, and the time of a
micro-step in the middle of a cycle, all in turns.
"""

import sys

from experiments.common import command
from experiments.micro_step.config import Config


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status of `command.execute`."""
    name = "experiments.micro_step"
    return command.main(Config, f"{name}.run", f"python -m {name}", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
