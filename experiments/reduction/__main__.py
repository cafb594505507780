"""Trains a small GPT-2 on several devices that average gradients, or sketches.

Without and with error feedback; counts the bytes that are all-reduced. On a machine
without accelerators JAX_NUM_CPU_DEVICES=8 makes eight devices.
"""

import sys

from experiments.common import command
from experiments.reduction.config import Config

main = command.question(Config, __doc__)

if __name__ == "__main__":
    sys.exit(main())
