"""Leaves these tests to test_extra.py where a package that they need is missing."""

import importlib.util
import pathlib

from tests.experiments import PACKAGES as EXPERIMENTS
from tests.experiments.datasets import PACKAGES

if any(importlib.util.find_spec(name) is None for name in EXPERIMENTS + PACKAGES):
    here = pathlib.Path(__file__).parent
    collect_ignore = [f.name for f in here.glob("*.py") if f.name != "test_extra.py"]
