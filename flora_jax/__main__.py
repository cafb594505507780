"""The command line: ``python -m flora_jax plan --help``."""

import os
import sys

from flora_jax.cli.plan import main


def run() -> int:
    """Runs the command; what reads its output, such as head, may stop early."""
    try:
        status = main()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # Or Python would fail again when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(run())
