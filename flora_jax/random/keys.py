"""PRNG keys: one raw root key in the state, one key per leaf and epoch from it.

Two rules keep all samples independent. No key is both folded and sampled from: the
chain below only folds, and what it returns is only sampled. And a key is salted with
the name of the transformation, so that two of them with the same seed do not share
projections.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax._typing import KeyLike
from flora_jax.random.bits import fold

if TYPE_CHECKING:
    from jaxtyping import Array, UInt32

IMPL = "threefry2x32"
_LAST = np.uint32(2**31 - 2)  # The last step before an int32 counter saturates.
_REMEDY = (
    "pass an int seed, jax.random.key(seed, impl='threefry2x32'), or its key data"
    " (uint32, shape (2,))"
)


def raw_key(key: KeyLike) -> np.ndarray | jax.Array:
    """Returns key data (uint32, shape (2,)) of a seed, a typed key or raw key data.

    Args:
      key: an int in [0, 2**64), a typed scalar key of threefry2x32, or key data.

    Returns:
      The key data; for an int the words that ``jax.random.key(seed)`` has.

    Raises:
      TypeError: for other types, dtypes, shapes or PRNG implementations.
      ValueError: for an int outside the range.
    """
    if isinstance(key, tuple):  # The words of a key, as a Sketch keeps them.
        return np.array(key, np.uint32)
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        key = int(key)
        if not 0 <= key < 2**64:
            raise ValueError(f"`key` must lie in [0, 2**64), got key={key}; {_REMEDY}")
        return np.array([key >> 32, key & 0xFFFFFFFF], np.uint32)
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        impl = str(jax.random.key_impl(key))
        if impl != IMPL or key.shape:
            raise TypeError(
                f"`key` must be one {IMPL} key, got implementation {impl!r} and shape"
                f" {key.shape}; {_REMEDY}"
            )
        return jax.random.key_data(key)
    if isinstance(key, jax.Array | np.ndarray):
        if key.dtype == np.uint32 and key.shape == (2,):
            return key
        raise TypeError(
            f"`key` must be uint32 key data of shape (2,), got dtype {key.dtype} and"
            f" shape {key.shape}; {_REMEDY}"
        )
    raise TypeError(f"`key` must be a seed or a PRNG key, got key={key!r}; {_REMEDY}")


def check_state_key(name: str, key: Any) -> None:
    """Raises if the root key in a state is no longer uint32 key data.

    A cast or an average over the full state destroys the key without an error; every
    projection would then be another one.

    Args:
      name: the transformation whose state it is.
      key: the ``key`` field of its state.

    Raises:
      TypeError: if dtype or shape are not those of key data.
    """
    if key.dtype != np.uint32 or key.shape != (2,):
        raise TypeError(
            f"`state.key` of {name} must be uint32 of shape (2,), got dtype"
            f" {key.dtype} and shape {key.shape}; something cast or averaged the whole"
            " optimizer state (optax.tree.cast and lax.pmean do): restore the key from"
            " a checkpoint or from tx.init, and cast parameter-shaped trees only, with"
            " optax.tree.map_params"
        )


def leaf_keys(
    root: jax.Array, name: str, paths: Sequence[str], epoch: Any
) -> UInt32[Array, "leaves 2"]:
    """Returns the keys of many leaves in one epoch, computed in one operation.

    Args:
      root: the state's key data, uint32 of shape (2,).
      name: the transformation's name, the salt.
      paths: the leaves' normalized paths; by path and not by index, so that masking a
        leaf does not move the randomness of the others.
      epoch: how often the projection was resampled before: an int, an int32 scalar, or
        one for each leaf.

    Returns:
      Key data, uint32 of shape (leaves, 2), to be sampled from, never folded again.
    """
    salts = np.array([zlib.crc32(path.encode()) for path in paths], np.uint32)
    # Only folds: see the rules above. Name and path are hashed in one of them.
    leaves = fold(root, np.uint32(zlib.crc32(name.encode())), salts)
    return fold(leaves, jnp.asarray(epoch).astype(jnp.uint32), np.uint32(0))


def renewal(
    count: Any, every: int | jax.Array, offset: jax.typing.ArrayLike = 0
) -> tuple[jax.Array, jax.Array]:
    """The epoch of a projection that is resampled every T steps, and whether it is new.

    Counted in uint32, where the offset cannot overflow. Once the int32 counter
    saturates, after 2³¹ − 1 steps, the epoch no longer advances and the last projection
    stays in use.

    Args:
      count: steps so far, an int32 scalar that ``optax.safe_increment`` counts.
      every: T; possibly traced, but the same at every step.
      offset: by how many steps a leaf is ahead; a scalar, or one for each leaf.

    Returns:
      The epoch, uint32, and whether it begins with this step; the first never does.
    """
    steps, period = (jnp.asarray(x).astype(jnp.uint32) for x in (count, every))
    ahead = jnp.minimum(steps, _LAST) + jnp.asarray(offset).astype(jnp.uint32)
    new = (ahead % period == 0) & (steps > 0) & (steps <= _LAST)
    return ahead // period, new
