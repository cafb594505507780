"""Memory of the backward pass: `python -m experiments.activations`."""
