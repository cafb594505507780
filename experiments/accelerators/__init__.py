"""The optimizer step on one TPU or GPU: `python -m experiments.accelerators`."""
