"""Command line: `python -m experiments`."""

import sys
from collections.abc import Sequence

import tyro

from experiments.config import Config, ConfigError

_DESCRIPTION = """\
Trains a small GPT-2 from scratch on the sources of Python's standard library, four
times: with Adafactor and a full or a FLORA momentum, and with a full or a FLORA
gradient accumulator. Same model, same seed, same examples in the same order. Nothing is
downloaded. Ends with a table, two pictures, and a checkpoint to --resume from."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: in place of the command line's own.

    Returns:
        The exit status: 0, 1 if a training diverged, 2 for settings that make no sense,
        130 if it was interrupted.
    """
    config = tyro.cli(
        Config,
        prog="python -m experiments",
        description=_DESCRIPTION,
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        config.validate()
        # Only now the heavy imports: a refused command line answers at once.
        from experiments.loop import NonFiniteLossError
        from experiments.run import run
    except ConfigError as error:
        return _complain(error, 2)
    try:
        run(config)
    except ConfigError as error:
        return _complain(error, 2)
    except NonFiniteLossError as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        return _complain(
            "interrupted; --resume continues from the last checkpoint", 130
        )
    return 0


def _complain(error: object, status: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
