"""Command line: `python -m experiments.finetune`."""

import sys
from collections.abc import Sequence

import tyro

from experiments.common.command import execute
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
    return execute(
        config,
        "experiments.finetune.run",
        "interrupted; the same command goes on from the last checkpoint",
        distributed=True,
    )


if __name__ == "__main__":
    sys.exit(main())
