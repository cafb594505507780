"""A leaf times factors that are not multiplied out."""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from flora_jax._xla import widened

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class ScaledLeaf(NamedTuple):
    """A leaf times factors that are not multiplied out.

    What Adafactor does to a gradient is a product with a column, a row and a number. A
    sketch can apply them to the projection and to its result, so that the scaled
    gradient is never written to memory.

    Attributes:
      leaf: an array of any float dtype.
      factors: float32 arrays that broadcast to it: scalars, or with all of its axes.
    """

    leaf: Float[Array, "..."]
    factors: tuple[jax.Array, ...] = ()

    def times(self, *factors: jax.Array) -> ScaledLeaf:
        """The leaf with more factors."""
        full = [factor.astype(jnp.float32) for factor in factors]
        return ScaledLeaf(self.leaf, (*self.factors, *full))

    def value(self) -> Float[Array, "..."]:
        """The product, float32."""
        # From the leaf on: the factors alone may overflow where it is zero.
        return functools.reduce(operator.mul, self.factors, widened(self.leaf))
