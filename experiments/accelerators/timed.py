"""Times optimizer steps on the attached device, and compares them with estimates.

One matrix of 4096 x 11008 and one process for each optimizer: its median step, and the
most memory that the device has held, beside the committed estimates of a compiler.
"""

import functools
import sys

from experiments.accelerators.config import Timed
from experiments.common import command

main = functools.partial(
    command.main,
    Timed,
    description=__doc__,
    module="experiments.accelerators.timing",
    prog="python -m experiments.accelerators.timed",
)

if __name__ == "__main__":
    sys.exit(main())
