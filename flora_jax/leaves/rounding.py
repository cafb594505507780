"""Adds updates to parameters, with stochastic rounding of those in bfloat16.

The random bits are a function of a key, the leaf's path and the element's index, so
that neither a mesh nor a loop over layers changes them.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax._typing import KeyData, PyTree, Shape
from flora_jax._xla import unstacked
from flora_jax.leaves.paths import named_leaves
from flora_jax.random.bits import threefry_2x32
from flora_jax.random.keys import leaf_keys

if TYPE_CHECKING:
    from jaxtyping import Array, BFloat16, Float, UInt32

_NAME = "apply_updates"


class Rounding(NamedTuple):
    """What the random bits of a leaf, or of some of its layers, are made from.

    Attributes:
      key: the leaf's, to be sampled from: two scalars, which a loop over layers leaves
        as they are.
      offsets: one array per axis, of size 1 along all others, whose sum is each
        element's index in the leaf in row-major order. A loop over layers slices them
        as it slices the leaf.
    """

    key: tuple[jax.Array, jax.Array]
    offsets: tuple[jax.Array, ...]

    def words(self) -> UInt32[Array, "..."]:
        """A uniform word for each element."""
        zero = jnp.uint32(0)
        counter = functools.reduce(operator.add, self.offsets, zero)
        x0, x1 = threefry_2x32(self.key, counter, zero)
        return x0 ^ x1


def leaf_roundings(key: KeyData | None, params: PyTree) -> list[Rounding | None]:
    """How each leaf is rounded, in flattening order; None for rounding to nearest.

    Args:
      key: key data; None to round all leaves to nearest.
      params: the parameters.
    """
    named = named_leaves(params)
    if key is None:
        return [None] * len(named)
    keys = unstacked(leaf_keys(key, _NAME, [path for path, _ in named], 0))
    return [
        Rounding((own[0], own[1]), _offsets(leaf.shape))
        if jnp.result_type(leaf) == jnp.bfloat16
        else None
        for own, (_, leaf) in zip(keys, named, strict=True)
    ]


def _offsets(shape: Shape) -> tuple[jax.Array, ...]:
    offsets = []
    for axis, size in enumerate(shape):
        along = [size if i == axis else 1 for i in range(len(shape))]
        # Modulo 2³²: elements of a leaf that are so far apart have the same bits.
        stride = np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        offsets.append(jax.lax.broadcasted_iota(jnp.uint32, along, axis) * stride)
    return tuple(offsets)


def add_update(
    param: jax.Array, update: jax.Array, rounding: Rounding | None = None
) -> jax.Array:
    """The new parameter, or the same part of it; as optax adds it without rounding."""
    if rounding is None:
        return jnp.asarray(param + update).astype(jnp.result_type(param))
    update = jnp.asarray(update)
    added = update.astype(jnp.float32)
    if update.dtype == jnp.bfloat16:
        # XLA leaves out conversions to fewer bits and back where it sees both: an
        # update would depend on what it is compiled with. Not for float16, whose
        # subnormal numbers this would make zero.
        info = jnp.finfo(update.dtype)
        added = jax.lax.reduce_precision(added, info.nexp, info.nmant)
    total = jnp.asarray(param, jnp.float32) + added
    return stochastically_rounded(total, rounding.words())


def stochastically_rounded(
    x: Float[Array, "..."], words: UInt32[Array, "..."]
) -> BFloat16[Array, "..."]:
    """Rounds to one of the two bfloat16 neighbours, unbiased.

    bfloat16 is the upper half of float32, for subnormal numbers too. The lower half is
    the distance of x from the neighbour nearer to zero, in units of 2⁻¹⁶ of the gap;
    adding a uniform 16-bit integer to it carries with just that probability.

    Args:
      x: float32.
      words: uint32 of the same shape, of which the upper halves are used.
    """
    pattern = jax.lax.bitcast_convert_type(x, jnp.uint32)
    upper = ((pattern + (words >> 16)) >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
    # A carry would turn values beyond the largest finite one into infinity, and change
    # NaN.
    is_between = jnp.abs(x) < np.float32(jnp.finfo(jnp.bfloat16).max)
    return jnp.where(is_between, rounded, x.astype(jnp.bfloat16))
