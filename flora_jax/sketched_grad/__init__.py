"""Gradients that are sketched during backpropagation."""
