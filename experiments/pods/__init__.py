"""The optimizer step of a 7B and a 70B model on a pod: `python -m experiments.pods`."""
