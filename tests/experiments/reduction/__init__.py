"""Tests of experiments.reduction."""
