"""Experiments with flora_jax: train a small GPT-2 with and without compression.

`python -m experiments --help` says what can be set. The package uses only the
public interface of `flora_jax`, so that every line of it can be copied.
"""
