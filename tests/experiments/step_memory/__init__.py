"""Tests of experiments.step_memory."""
