"""Transformations that change each element of an update by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flora_jax._typing import PyTree
from flora_jax._xla import widened

_LEAST = 1e-3  # Adafactor's epsilon_2: parameters that start at zero must leave it.


class Elementwise(NamedTuple):
    """A transformation of full updates, and of any part of them.

    Attributes:
      tx: of full updates.
      scalars: from its state and the parameters to what it needs to know of each leaf.
      apply: from that, an update and a parameter, or the same part of both, to the
        update as ``tx`` gives it.
    """

    tx: optax.GradientTransformation
    scalars: Callable[[Any, PyTree], list[Any]]
    apply: Callable[[Any, jax.Array, jax.Array], jax.Array]


def parameter_scale() -> Elementwise:
    """Multiplies each leaf's update by the RMS of its parameter, 1e-3 at least.

    The values of ``optax.scale_by_param_block_rms``. That one guards the derivative at
    zero by a ``where`` over the full parameter, which XLA writes to memory before it
    squares it: half the time of a FLORA step. Here the bound on the square guards it.
    """

    def apply(rms: jax.Array, update: Any, param: Any) -> jax.Array:
        del param
        return (update * rms).astype(update.dtype)

    return Elementwise(
        optax.stateless_with_tree_map(lambda u, p: apply(_rms(p), u, p)),
        lambda state, params: list(map(_rms, jax.tree.leaves(params))),
        apply,
    )


def _rms(parameter: Any) -> jax.Array:
    full = widened(parameter)
    return jnp.sqrt(jnp.maximum(jnp.mean(full * full), _LEAST**2))


def decayed_weights(weight_decay: optax.ScalarOrSchedule, mask: Any) -> Elementwise:
    """``optax.add_decayed_weights``."""

    def scalars(state: Any, params: PyTree) -> list[Any]:
        own = state if mask is None else state.inner_state
        value = weight_decay(own.count) if callable(weight_decay) else weight_decay
        if isinstance(value, int | float) and value == 0:  # As optax skips it.
            value = None
        kept = True if mask is None else _resolved(mask, params)
        kept = jax.tree.broadcast(kept, params)
        return [value if keep else None for keep in jax.tree.leaves(kept)]

    def apply(decay: Any, update: jax.Array, param: jax.Array) -> jax.Array:
        return update if decay is None else update + decay * param

    tx = optax.add_decayed_weights(weight_decay, mask)
    return Elementwise(tx, scalars, apply)


def _resolved(mask: Any, params: PyTree) -> PyTree:
    """The tree of bools of a mask, which may be a callable."""
    # As optax decides: the root of a tree may be callable, too.
    leaves = jax.tree.leaves(jax.tree.map(callable, mask))
    return mask(params) if leaves and all(leaves) else mask


def negative_learning_rate(learning_rate: optax.ScalarOrSchedule) -> Elementwise:
    """``optax.scale_by_learning_rate``."""

    def scalars(state: Any, params: PyTree) -> list[Any]:
        value: Any = learning_rate
        if callable(learning_rate):
            value = learning_rate(state.count)
        return len(jax.tree.leaves(params)) * [-value]

    def apply(factor: Any, update: jax.Array, param: jax.Array) -> jax.Array:
        del param
        # optax rounds a schedule's value to the updates' dtype, but not a number.
        if callable(learning_rate):
            factor = jnp.asarray(factor, update.dtype)
        return factor * update

    return Elementwise(optax.scale_by_learning_rate(learning_rate), scalars, apply)
