"""Data parallelism that reduces sketches: `python -m experiments.reduction`."""
