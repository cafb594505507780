"""Leaves these tests out where the packages of the extra are missing."""

import importlib.util

from tests.experiments import PACKAGES

# Helpers that import torch, which need not be there, and have no examples to run.
collect_ignore = ["pytorch.py", "fixtures/make.py"]

if any(importlib.util.find_spec(package) is None for package in PACKAGES):
    collect_ignore_glob = ["*.py"]  # tests/experiments/test_extra.py says which
