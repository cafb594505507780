"""Tells what a training step needs, for any published model, allocating nothing.

Parameters, optimizer state, gradient accumulator, and the compiler's account of the
step that accumulates a micro-batch and of the step that applies the update.
"""

import sys

from experiments.common import command
from experiments.step_memory.config import Config

main = command.question(Config, __doc__)

if __name__ == "__main__":
    sys.exit(main())
