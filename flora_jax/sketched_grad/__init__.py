"""Gradients that are sketched during backpropagation."""

from flora_jax.sketched_grad.api import (
    LeafReport,
    explain_sketched_gradients,
    sketched_value_and_grad,
)

__all__ = ["LeafReport", "explain_sketched_gradients", "sketched_value_and_grad"]
