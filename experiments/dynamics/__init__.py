"""What LoRA and FLORA do to the weights: `python -m experiments.dynamics`."""
