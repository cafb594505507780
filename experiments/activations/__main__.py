"""Tells what sketches in place of activations save between forward and backward pass.

By the chip's own compiler: temporaries of value and gradient alone, of full gradients
and of gradients sketched during backpropagation. Nothing is allocated or executed.
"""

import sys

from experiments.activations.config import Config
from experiments.common import command

main = command.question(Config, __doc__)

if __name__ == "__main__":
    sys.exit(main())
