"""Random bits that never change: the Threefry-2x32 hash, written out.

A sketch in a checkpoint means nothing without its projection, which is regenerated from
a key for years to come. The bits of ``jax.random`` depend on a global flag
(``jax_threefry_partitionable``) and its distributions on jax's version; these depend on
nothing; normals made from them vary in the last place with a device's logarithm. They
are elementwise functions of a counter, so that sharding cannot change them, and a batch
of keys costs one operation.

Reference: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax._typing import KeyData, Shape

if TYPE_CHECKING:
    from jaxtyping import Array, Float, UInt32

_PARITY = np.uint32(0x1BD11BDA)
_ROWS = 8  # Of a TPU's vector register.
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


# Under jit it is traced once for each shape: a hundred equations in every sample.
@jax.jit
def threefry_2x32(
    key: tuple[jax.Array, jax.Array], x0: jax.Array, x1: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The hash of two words under a key of two words, 20 rounds.

    Args:
      key: two uint32 arrays.
      x0: uint32, broadcastable with x1 and the key.
      x1: uint32.

    Returns:
      Two uint32 arrays of the broadcast shape.
    """
    words = (*key, key[0] ^ key[1] ^ _PARITY)
    x0, x1 = x0 + words[0], x1 + words[1]
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            x0 = x0 + x1
            x1 = (x1 << rotation) | (x1 >> (32 - rotation))
            x1 = x0 ^ x1
        x0 = x0 + words[(block + 1) % 3]
        x1 = x1 + words[(block + 2) % 3] + np.uint32(block + 1)
    return x0, x1


def fold(
    key: UInt32[Array, "*n 2"], x0: jax.typing.ArrayLike, x1: jax.typing.ArrayLike
) -> UInt32[Array, "*n 2"]:
    """New keys from keys and two words of data each, uint32 of shape (…, 2)."""
    words = jnp.asarray(x0, jnp.uint32), jnp.asarray(x1, jnp.uint32)
    return jnp.stack(threefry_2x32((key[..., 0], key[..., 1]), *words), axis=-1)


def hashes(
    key: KeyData, shape: Shape, stream: int, first: jax.typing.ArrayLike = 0
) -> tuple[jax.Array, jax.Array]:
    """Two independent uniform uint32 words per element.

    Args:
      key: key data, uint32 of shape (2,).
      shape: shape of the results, of fewer than 2**32 elements.
      stream: number of an independent stream of this key.
      first: index of the first element, if these are part of a larger array.

    Returns:
      Two uint32 arrays of the given shape.
    """
    # A counter per element: its place in row-major order.
    counter = jnp.full(shape, first, jnp.uint32)
    for axis in range(len(shape)):
        place = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        counter = counter + place * np.uint32(math.prod(shape[axis + 1 :]))
    return threefry_2x32((key[0], key[1]), counter, jnp.uint32(stream))


def bits(
    key: KeyData, shape: Shape, stream: int, first: jax.typing.ArrayLike = 0
) -> UInt32[Array, "..."]:
    """Uniform uint32 words; arguments as :func:`hashes`."""
    x0, x1 = hashes(key, shape, stream, first)
    return x0 ^ x1


def signs(
    key: KeyData, shape: Shape, stream: int, first: jax.typing.ArrayLike = 0
) -> Float[Array, "..."]:
    """Uniform signs, float32 ±1; arguments as :func:`hashes`."""
    return 1.0 - 2.0 * (bits(key, shape, stream, first) >> 31).astype(jnp.float32)


def normals(
    key: KeyData, shape: Shape, stream: int, first: jax.typing.ArrayLike = 0
) -> Float[Array, "..."]:
    """Standard normals, float32; arguments as :func:`hashes`.

    Box and Muller's √(−2 ln u)·sin 2πv, v in (−1/4, 1/4), which is as symmetric as a
    full turn. Both words of one hash, and a polynomial in place of the sine (to 1e-7),
    so that all of it is one loop for XLA. No value is infinite; the largest is 5.9.
    """
    u, v = hashes(key, shape, stream, first)
    u = ((u >> 8).astype(jnp.float32) + 0.5) * np.float32(2**-24)
    v = ((v >> 9).astype(jnp.float32) + 0.5) * np.float32(2**-24) - np.float32(0.25)
    x = v * np.float32(2 * math.pi)
    square, sine = x * x, jnp.float32(0)
    for i in (11, 9, 7, 5, 3, 1):
        sine = sine * square + np.float32((-1) ** (i // 2) / math.factorial(i))
    return jnp.sqrt(-2 * jnp.log(u)) * (x * sine)


def random_matrix(
    sample: Callable[..., jax.Array], key: KeyData, shape: tuple[int, int]
) -> Float[Array, "n m"]:
    """A matrix of samples, from stream 0 of a key.

    Args:
      sample: :func:`signs` or :func:`normals`.
      key: key data.
      shape: (n, m).
    """
    return jax.lax.platform_dependent(
        key,
        tpu=functools.partial(by_rows, sample, shape=shape),
        default=functools.partial(sample, shape=shape, stream=0),
    )


def by_rows(
    sample: Callable[..., jax.Array], key: KeyData, shape: tuple[int, int]
) -> Float[Array, "n m"]:
    """:func:`random_matrix`, a few rows at a time.

    A TPU's compiler unrolls the hash over all that it keeps in VMEM, for half a minute;
    the loop compiles in a fraction of a second.
    """
    rows, columns = shape
    step = math.gcd(rows, _ROWS)
    firsts = np.arange(0, rows, step, dtype=np.uint32) * np.uint32(columns)
    parts = jax.lax.map(lambda first: sample(key, (step, columns), 0, first), firsts)
    return parts.reshape(shape)
