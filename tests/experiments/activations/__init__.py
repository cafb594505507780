"""Tests of experiments.activations."""
