"""The command line: ``python -m flora_jax plan --help``."""

import sys

from flora_jax.memory._command import main

if __name__ == "__main__":
    sys.exit(main())
