"""Gradients that are sketched during backpropagation."""

from flora_jax.sketched_grad.api import (
    LeafReport,
    born_compressed,
    sketched_value_and_grad,
)

__all__ = ["LeafReport", "born_compressed", "sketched_value_and_grad"]
