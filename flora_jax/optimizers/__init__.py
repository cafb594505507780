"""Named recipes over the transformations."""

from flora_jax.optimizers._flora import flora

__all__ = ["flora"]
