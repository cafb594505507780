"""How a matrix is sketched: pure functions of (key, matrix)."""

from flora_jax.projections._base import Projection
from flora_jax.projections._count_sketch import CountSketch
from flora_jax.projections._dense import Gaussian, Orthogonal, Rademacher
from flora_jax.projections._srht import SRHT

__all__ = ["SRHT", "CountSketch", "Gaussian", "Orthogonal", "Projection", "Rademacher"]
