"""One training run on one screen each, for the usual ways to hold parameters."""

import sys

from experiments.common import command

# `python -m` imports this before the example, and so before what may be missing.
sys.excepthook = command.explain_missing_package
