"""Memory of one training step of any model: `python -m experiments.step_memory`."""
