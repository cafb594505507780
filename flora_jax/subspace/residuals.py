"""From a direction in a subspace to an update of the leaf."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from flora_jax.leaves.plan import LeafPlan
from flora_jax.projections import ObliviousProjection
from flora_jax.transforms.parts import widened
from flora_jax.sketching.sketcher import Sketcher

if TYPE_CHECKING:
    from jaxtyping import Array, Float

RESIDUALS = ("dropped", "plain", "fira", "fira_code", "apollo")
NORMS = ("channel", "tensor")
_SMALL = 1e-8  # Added to norms that are divided by, as the papers do.
_LEAST = 1 / 8  # Of what a random sketch is expected to see of a row's norm.
_ROUNDING = 2.0**-19  # Of ‖G‖²: what float32 cannot tell from none, 16 roundings.


def bring_back(
    sketcher: Sketcher,
    residual: str,
    norms: str,
    plan: LeafPlan,
    drawn: Any,
    grad: Float[Array, "..."],
    sketch: Float[Array, "..."],
    direction: Float[Array, "..."],
    previous: jax.Array | None,
    scale: Any,
    limiter: Any,
    correction: Any,
) -> tuple[Float[Array, "..."], jax.Array | None]:
    """One leaf's update in the full space, float32, and the norm that limits the next.

    The update is a·G + B S, with a of one number per row or column: nothing of the
    leaf's size is made but the update itself.

    Args:
      sketcher: the settings.
      residual: one of RESIDUALS.
      norms: one of NORMS.
      plan: the leaf's plan.
      drawn: what fixes S.
      grad: G.
      sketch: R, in the state's shape.
      direction: N, the inner transformation's update, in the state's shape.
      previous: norm of the last residual, one per matrix, or None without limiter.
      scale: α.
      limiter: γ, or None.
      correction: factor that the inner transformation's debiasing puts into N.

    Returns:
      The update in the leaf's shape, and the new ``previous``.
    """
    direction = direction.astype(jnp.float32)
    if plan.dense_reason is not None:
        return direction, previous
    if residual == "dropped":
        return sketcher.unsketch(plan, drawn, scale * direction), previous
    full, r, n = (plan.fold(widened(x)) for x in (grad, sketch, direction))
    if residual == "plain":
        back = plan.unfold(scale * n - r, plan.state_shape)
        return widened(grad) + sketcher.unsketch(plan, drawn, back), previous
    sides = plan.axis if norms == "channel" else (-2, -1)
    seen = _length(r, sides)
    if residual != "apollo" and isinstance(sketcher.projection, ObliviousProjection):
        # A row may cancel in a random sketch: it then says nothing of the row's scale.
        share = _LEAST * (plan.rank / plan.width) ** 0.5
        seen = jnp.maximum(seen, share * _length(full, sides))
    factor = _length(n, sides) / (seen + _SMALL)
    # How much of the sketch the residual leaves out, and what the whole is scaled by.
    part = {"fira": 1.0, "fira_code": scale, "apollo": 0.0}[residual]
    factor = factor * scale if residual == "apollo" else factor
    if previous is not None:
        # ‖G − p·R S‖² per row or column, as S has orthonormal rows where p > 0. A
        # residual of roundings counts as none: it would hold back what follows it.
        whole = _squares(full, plan.axis)
        left = whole - part * (2 - part) * _squares(r, plan.axis)
        left = jnp.where(left > _ROUNDING * whole, left, 0.0)
        norm = jnp.sum(factor**2 * left, (-2, -1), keepdims=True)
        norm, old = jnp.sqrt(norm) / correction, plan.fold(previous)
        growth = jnp.maximum(norm / (old + _SMALL), limiter) / limiter
        growth = jnp.where(old > 0, growth, 1.0)  # A first step is not limited.
        factor = factor / growth
        previous = plan.unfold(norm / growth, previous.shape)
    update = plan.unfold(factor * full, plan.shape)
    if residual != "apollo":
        back = plan.unfold(scale * n - part * factor * r, plan.state_shape)
        update = update + sketcher.unsketch(plan, drawn, back)
    return update, previous


def _length(x: jax.Array, axes: Any) -> jax.Array:
    return jnp.sqrt(_squares(x, axes))


def _squares(x: jax.Array, axes: Any) -> jax.Array:
    if axes == -1:  # XLA on CPU sums products along rows twice as fast as squares.
        highest = jax.lax.Precision.HIGHEST
        return jnp.einsum("...nm,...nm->...n", x, x, precision=highest)[..., None]
    return jnp.sum(x * x, axes, keepdims=True)
