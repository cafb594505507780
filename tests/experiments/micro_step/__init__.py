"""Tests of experiments.micro_step."""
