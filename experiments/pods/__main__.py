"""Compiles the optimizer's step for TPU pods; no TPU is needed.

The compiler reports what each chip holds and what the chips send one another, and
refuses a step that does not fit. It needs `pip install -e '.[tpu-compiler]'`.
"""

import sys

from experiments.common import command
from experiments.pods.config import Config

main = command.question(Config, __doc__)

if __name__ == "__main__":
    sys.exit(main())
