"""How a matrix is sketched: pure functions of (key, matrix)."""

from flora_jax.projections._base import Projection
from flora_jax.projections._count_sketch import CountSketch
from flora_jax.projections._gaussian import Gaussian

__all__ = ["CountSketch", "Gaussian", "Projection"]
