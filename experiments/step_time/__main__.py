"""Times one optimizer step on trees of GPT-2's shapes.

optax's optimizers and ours, in one process and in turns. Writes the data, a table and a
picture.
"""

import sys

from experiments.common import command
from experiments.step_time.config import Config

main = command.question(Config, __doc__)

if __name__ == "__main__":
    sys.exit(main())
