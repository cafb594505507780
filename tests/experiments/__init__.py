"""Tests of the experiments, and the packages of the extra that they need."""

from experiments.common.command import EXTRA

PACKAGES = tuple(sorted(EXTRA))
