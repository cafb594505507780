"""A grid of short runs, one JSON line each: `python -m experiments.sweep`."""
