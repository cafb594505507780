"""Tests of experiments.sweep."""
