"""What every command line does with its settings."""

import importlib
import os
import sys
from typing import Any

from experiments.common.errors import (
    NO_ROOM,
    ConfigError,
    DiskError,
    NonFiniteLossError,
)


def execute(
    config: Any,
    module: str,
    interrupted: str = "interrupted",
    *,
    distributed: bool = False,
) -> int:
    """Checks the settings, then imports what is heavy and runs it.

    A refused command line answers at once, in one line.

    Args:
        config: the settings, with a method `validate`.
        module: has a function `run` of them.
        interrupted: what to say after Ctrl-C.
        distributed: the job can be run by several processes; this one joins the others
            if JAX_COORDINATOR_ADDRESS is set.

    Returns:
        The exit status: 0, 1 if a training diverged or the disk is full, 2 for settings
        that make no sense, 130 if it was interrupted.
    """
    try:
        config.validate()
        if distributed and "JAX_COORDINATOR_ADDRESS" in os.environ:
            processes = importlib.import_module("experiments.common.processes")
            processes.join()
            processes.check_same("the command line", config)
        importlib.import_module(module).run(config)
    except ConfigError as error:
        return _complain(error, 2)
    except (DiskError, NonFiniteLossError) as error:
        return _complain(error, 1)
    except OSError as error:  # of metrics or a report; those of checkpoints say more
        if error.errno not in NO_ROOM:
            raise
        return _complain(f"{error}; make room, then start again", 1)
    except KeyboardInterrupt:
        return _complain(interrupted, 130)
    return 0


def _complain(error: object, status: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return status
