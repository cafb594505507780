"""What every command line does with its settings."""

import importlib
import sys
from typing import Any

from experiments.config import ConfigError, NonFiniteLossError


def execute(config: Any, module: str, interrupted: str = "interrupted") -> int:
    """Checks the settings, then imports what is heavy and runs it.

    A refused command line answers at once, in one line.

    Args:
        config: the settings, with a method `validate`.
        module: has a function `run` of them.
        interrupted: what to say after Ctrl-C.

    Returns:
        The exit status: 0, 1 if a training diverged, 2 for settings that make no sense,
        130 if it was interrupted.
    """
    try:
        config.validate()
        importlib.import_module(module).run(config)
    except ConfigError as error:
        return _complain(error, 2)
    except NonFiniteLossError as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        return _complain(interrupted, 130)
    return 0


def _complain(error: object, status: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return status
