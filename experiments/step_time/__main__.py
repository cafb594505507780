"""Times one optimizer step on trees of GPT-2's shapes.

optax's optimizers and ours, in one process and in turns. Writes the data, a table and a
picture.
"""

import sys

from experiments.common import command
from experiments.step_time.config import Config


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status of `command.execute`."""
    name = "experiments.step_time"
    return command.main(Config, f"{name}.run", f"python -m {name}", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
