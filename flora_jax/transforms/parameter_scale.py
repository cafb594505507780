"""Adafactor's relative step size, in one pass over the parameters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from flora_jax._typing import PyTree
from flora_jax._xla import widened

_LEAST = 1e-3  # Adafactor's epsilon_2: parameters that start at zero must leave it.


def scale_by_parameter_scale() -> optax.GradientTransformation:
    """Multiplies each leaf's update by the RMS of its parameter, 1e-3 at least.

    The values of ``optax.scale_by_param_block_rms``. That one guards the derivative at
    zero by a ``where`` over the whole parameter, which XLA writes to memory before it
    squares it: half the time of a FLORA step. Here the bound on the square guards it.

    Returns:
      The gradient transformation, without state; ``update`` needs ``params``.
    """

    def update_fn(
        updates: PyTree, state: Any, params: PyTree = None
    ) -> tuple[PyTree, Any]:
        return jax.tree.map(_scale, updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update_fn)


def _scale(update: jax.Array, parameter: jax.Array) -> jax.Array:
    full = widened(parameter)
    rms = jnp.sqrt(jnp.maximum(jnp.mean(full * full), _LEAST**2))
    return (update * rms).astype(update.dtype)
