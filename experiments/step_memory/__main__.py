"""Tells what a training step takes on one chip, for published models.

By the chip's own compiler: parameters, state and temporaries of one program, which
computes a loss and gradients and updates the parameters, or why it is refused. Nothing
is allocated or executed.
"""

import sys

from experiments.common import command
from experiments.step_memory.config import Config

main = command.question(Config, __doc__)

if __name__ == "__main__":
    sys.exit(main())
