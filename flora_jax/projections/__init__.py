"""How a matrix is sketched: pure functions of (key, matrix)."""

from flora_jax.projections.base import (
    AdaptiveProjection,
    MatrixProjection,
    ObliviousProjection,
    Projection,
    along,
    multiply,
    product,
)
from flora_jax.projections.count_sketch import CountSketch
from flora_jax.projections.gaussian import Gaussian
from flora_jax.projections.orthogonal import Orthogonal
from flora_jax.projections.rademacher import Rademacher
from flora_jax.projections.srht import SRHT
from flora_jax.projections.top_dct import TopDCT
from flora_jax.projections.top_svd import TopSVD

__all__ = [
    "SRHT",
    "AdaptiveProjection",
    "CountSketch",
    "Gaussian",
    "MatrixProjection",
    "ObliviousProjection",
    "Orthogonal",
    "Projection",
    "Rademacher",
    "TopDCT",
    "TopSVD",
    "along",
    "multiply",
    "product",
]
