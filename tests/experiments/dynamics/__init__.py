"""Tests of experiments.dynamics."""
