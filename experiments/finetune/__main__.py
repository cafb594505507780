"""Command line: `python -m experiments.finetune`."""

import sys
from collections.abc import Sequence

import tyro

from experiments.config import ConfigError
from experiments.finetune.published import PRESETS

_DESCRIPTION = """\
Trains T5 or GPT-2 on summarisation or translation with FLORA, LoRA and their
uncompressed peers, and evaluates what they write. The first word chooses a set of
defaults: docstrings and phrases run at once and offline; the others are the settings of
the FLORA paper and want its data and checkpoints."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: in place of the command line's own.

    Returns:
        The exit status: 0, 1 if a training diverged, 2 for settings that make no sense,
        130 if it was interrupted.
    """
    config = tyro.extras.overridable_config_cli(
        PRESETS,
        prog="python -m experiments.finetune",
        description=_DESCRIPTION,
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        config.validate()
        # Only now the heavy imports: a refused command line answers at once.
        from experiments.finetune.run import run
        from experiments.loop import NonFiniteLossError
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
            "interrupted; the same command goes on from the last checkpoint", 130
        )
    return 0


def _complain(error: object, status: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
