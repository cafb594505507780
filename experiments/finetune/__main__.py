"""Command line: `python -m experiments.finetune`."""

import sys
from collections.abc import Sequence

from experiments.common import command
from experiments.finetune.presets import PRESETS

_DESCRIPTION = """\
Trains T5 or GPT-2 on summarization or translation with FLORA, LoRA and their
uncompressed peers, and evaluates what they write. The first word chooses a set of
defaults: docstrings and phrases run at once and offline; the others are the settings of
the FLORA paper and need its data and checkpoints."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit status."""
    return command.main(
        PRESETS,
        "experiments.finetune.run",
        "python -m experiments.finetune",
        _DESCRIPTION,
        arguments,
        interrupted="interrupted; the same command continues from the last checkpoint",
        distributed=True,
    )


if __name__ == "__main__":
    sys.exit(main())
