"""Tests of experiments.step_time."""
