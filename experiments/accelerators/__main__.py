"""Compiles the optimizer's step for one TPU or GPU; neither is needed.

The compilers report what the step holds in memory; its optimized program tells what
each kernel reads, writes and multiplies. A TPU's needs
`pip install -e '.[tpu-compiler]'`; what a GPU's needs, the command says.
"""

import sys

from experiments.accelerators.config import Config
from experiments.common import command

main = command.question(Config, __doc__)

if __name__ == "__main__":
    sys.exit(main())
