"""Compiles the optimizer's step for TPU pods, which need not be there.

The compiler tells what a chip holds, what the chips send one another, and refuses what
does not fit. It needs `pip install -e '.[tpu-compiler]'`.
"""

import sys

from experiments.common import command
from experiments.pods.config import Config

main = command.question(Config, __doc__)

if __name__ == "__main__":
    sys.exit(main())
