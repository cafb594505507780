"""What LoRA and FLORA do to the weights of a fine-tuning from a checkpoint.

How close LoRA's change stays to the projected accumulated gradient, and the spectrum of
what each method changes. Writes the numbers, two tables and two pictures.
"""

import sys

from experiments.common import command
from experiments.dynamics.config import Config

main = command.question(Config, __doc__)

if __name__ == "__main__":
    sys.exit(main())
