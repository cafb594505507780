"""How a matrix is sketched: pure functions of (key, matrix)."""

from flora_jax.projections._base import (
    AdaptiveProjection,
    ObliviousProjection,
    Projection,
)
from flora_jax.projections._count_sketch import CountSketch
from flora_jax.projections._dct import TopDCT
from flora_jax.projections._dense import Gaussian, Orthogonal, Rademacher
from flora_jax.projections._srht import SRHT
from flora_jax.projections._svd import TopSVD

__all__ = [
    "SRHT",
    "AdaptiveProjection",
    "CountSketch",
    "Gaussian",
    "ObliviousProjection",
    "Orthogonal",
    "Projection",
    "Rademacher",
    "TopDCT",
    "TopSVD",
]
