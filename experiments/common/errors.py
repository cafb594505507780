"""What goes wrong in an experiment, and the exit status that it ends with.

Nothing here imports jax: a refused command line answers at once.
"""

import errno


class ConfigError(ValueError):
    """A setting that makes no sense; the message names it and says what does."""


class NonFiniteLossError(RuntimeError):
    """The training diverged; the message says where and what to lower."""


# Numbers of the system's errors for a write that found no room.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskError(RuntimeError):
    """A checkpoint could not be written; the message says which, why and what helps."""


def flag(field: str) -> str:
    """Returns the command-line flag of a field: `stop_after` is `--stop-after`."""
    return "--" + field.replace("_", "-")
