"""Times the optimizer's steps on the attached device, beside the compilers' accounts.

One matrix of 4096 x 11008 and one process for each optimizer: its median step, and the
most memory that the device has held. On a GPU all of it takes ten minutes.
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
