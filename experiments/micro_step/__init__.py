"""A micro-step with sketched gradients: `python -m experiments.micro_step`."""
