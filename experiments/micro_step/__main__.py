"""One micro-step of gradient accumulation, with full and with sketched gradients.

Blocks of published sizes with random weights, unrolled: FLOPs of the gradient function
by XLA's count, the buffers of a weight's shape in its program, and the time of a
micro-step in the middle of a cycle, all in turns.
"""

import sys

from experiments.common import command
from experiments.micro_step.config import Config

main = command.question(Config, __doc__)

if __name__ == "__main__":
    sys.exit(main())
