"""What Adafactor does to an update: factored second moment, clipping, relative step.

The statistics are in a layout that keeps every parameter axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flora_jax import _validation
from flora_jax._typing import PyTree, Shape
from flora_jax._xla import unshared
from flora_jax.leaves.plan import LeafPlan
from flora_jax.leaves.rules import LeafRules
from flora_jax.leaves.trees import matching_leaves, rebuild, zeros_tree
from flora_jax.sketching.sketcher import OnSketch, ScaledLeaf, refuse_sketches
from flora_jax.transforms.parts import Part, leafwise

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_NAME = "scale_by_factored_rms"


class FactoredRmsState(NamedTuple):
    """State of :func:`scale_by_factored_rms`.

    Attributes:
      count: number of updates so far, int32.
      v_row: tree of second moments averaged over the larger side of each matrix.
      v_col: tree of second moments averaged over the smaller side.
      v: tree of unfactored second moments.

    Each tree has one array per parameter leaf, with the parameter's number of axes;
    those that a leaf does not use have size 1.
    """

    count: Any
    v_row: PyTree
    v_col: PyTree
    v: PyTree


def scale_by_factored_rms(
    decay_rate: jax.typing.ArrayLike = 0.8,
    *,
    epsilon: jax.typing.ArrayLike = 1e-30,
    rules: LeafRules = LeafRules(max_aspect_ratio=math.inf),
) -> optax.GradientTransformationExtraArgs:
    """Divides updates by a factored estimate of their root mean square.

    With β_t = 1 − (t+1)^−decay_rate and, for a leaf folded to G (n x m),

      R ← β_t R + (1−β_t) mean_over_larger_side(G² + ε),
      C ← β_t C + (1−β_t) mean_over_smaller_side(G² + ε),
      update = G · (R / mean(R))^−½ · C^−½.

    The same as ``optax.scale_by_factored_rms`` where both factor the same two axes:
    matrices, and stacks of fewer matrices than their smaller side. Otherwise optax
    takes the two largest axes and this the fold of the plan: (768, 12, 64) is factored
    as 768 x 768, where optax keeps a full second moment. And the statistics keep every
    axis of the parameter (reduced ones have size 1), so that the state can be created
    under sharding metadata.

    Memory: n + m float32 elements per factored leaf, the leaf's size otherwise. There
    is no coarser dtype: its last steps, 1−β_t, would be lost to rounding.

    Args:
      decay_rate: exponent of the decay schedule; 0.8 as in Adafactor.
      epsilon: added to the squared gradient; 1e-30 as in Adafactor.
      rules: which leaves are factored, and by which axes; sides of 128 or more, of any
        aspect ratio, as in Adafactor.

    Returns:
      The gradient transformation. Updates have the dtype of the gradients.

    Raises:
      TypeError: for arguments of a wrong type.
      ValueError: for arguments out of range; from update, if gradients and state do
        not match.

    Example:
      >>> import jax.numpy as jnp
      >>> import flora_jax as fj
      >>> state = fj.scale_by_factored_rms().init({"w": jnp.ones((12, 256, 512))})
      >>> state.v_row["w"].shape, state.v_col["w"].shape, state.v["w"].shape
      ((12, 256, 1), (12, 1, 512), (1, 1, 1))

    References:
      Shazeer and Stern, `Adafactor: Adaptive Learning Rates with Sublinear Memory Cost
      <https://arxiv.org/abs/1804.04235>`_, 2018
    """
    return leafwise(factored_rms_part(decay_rate, epsilon, rules))


def factored_rms_part(
    decay_rate: jax.typing.ArrayLike, epsilon: jax.typing.ArrayLike, rules: LeafRules
) -> Part:
    """:func:`scale_by_factored_rms` as a part of a chain."""
    _validation.check_number("decay_rate", decay_rate, 0, None, "0.8 is Adafactor's")
    _validation.check_number("epsilon", epsilon, 0, None, "1e-30 is Adafactor's")
    if not isinstance(rules, LeafRules):
        raise TypeError(
            f"`rules` must be LeafRules, got {rules!r}; pass fj.LeafRules()"
        )

    def init(params: PyTree) -> FactoredRmsState:
        plans = rules.plan(params)
        rules.check_stacked(_NAME, plans, params)
        shapes = [_statistics_shapes(plan) for plan in plans]
        own = [[shape[i] for shape in shapes] for i in range(3)]
        trees = [zeros_tree(params, plans, each, jnp.float32) for each in own]
        return FactoredRmsState(jnp.zeros([], jnp.int32), *trees)

    def plan(updates: PyTree, state: Any) -> tuple[LeafPlan, ...]:
        refuse_sketches(_NAME, updates, "it averages the squares of the gradients")
        plans = rules.plan(updates)
        shapes = [_statistics_shapes(plan) for plan in plans]
        for i, field in enumerate(("v_row", "v_col", "v")):
            own = [shape[i] for shape in shapes]
            matching_leaves(_NAME, field, getattr(state, field), plans, own)
        return plans

    return Part(init, plan, _step, (decay_rate, epsilon))


def _step(
    plans: Sequence[LeafPlan],
    leaves: Sequence[ScaledLeaf],
    state: FactoredRmsState,
    on_sketch: OnSketch,
    decay_rate: Any,
    epsilon: Any,
) -> tuple[list[ScaledLeaf], FactoredRmsState]:
    """All leaves, scaled, and the new state."""
    del on_sketch
    # β_t = 1 − (t+1)^−decay_rate is 0 at first: no debiasing is needed.
    decay = 1 - (state.count.astype(jnp.float32) + 1) ** -decay_rate
    trees = (state.v_row, state.v_col, state.v)
    old = zip(plans, leaves, *map(jax.tree.leaves, trees), strict=True)
    results = [factored_rms_step(plan, decay, epsilon, *leaf) for plan, *leaf in old]
    scaled, *statistics = zip(*results, strict=True) if results else 4 * [()]
    new = rebuild(trees, [x for own in statistics for x in own])
    return list(scaled), FactoredRmsState(optax.safe_increment(state.count), *new)


def _statistics_shapes(plan: LeafPlan) -> tuple[Shape, Shape, Shape]:
    """Shapes of v_row, v_col and v of one leaf."""
    if plan.dense:
        return plan.ones, plan.ones, plan.shape
    row, column = (
        tuple([1 if i in axes else n for i, n in enumerate(plan.shape)])
        for axes in plan.larger_smaller
    )
    return row, column, plan.ones


def factored_rms_step(
    plan: LeafPlan,
    decay: jax.Array,
    epsilon: Any,
    grad: ScaledLeaf,
    v_row: Float[Array, "..."],
    v_col: Float[Array, "..."],
    v: Float[Array, "..."],
) -> tuple[ScaledLeaf, jax.Array, jax.Array, jax.Array]:
    """One leaf with the factors that scale it, and its new v_row, v_col and v."""
    if plan.dense:
        full = grad.value()
        new = decay * v + (1 - decay) * (full * full + epsilon)
        return grad.times(jax.lax.rsqrt(new)), v_row, v_col, new.astype(v.dtype)
    larger, smaller = plan.larger_smaller
    if grad.threshold is not None:
        grad = grad.clipped()
    if grad.source is not None and grad.source.plan.batch_axes[0] in plan.batch_axes:

        def mean_squares(x: jax.Array, *_: Any) -> tuple[None, list[jax.Array]]:
            sides = larger, smaller
            return None, [jnp.mean(x * x, axis=side, keepdims=True) for side in sides]

        _, (row_mean_square, column_mean_square) = grad.by_layers(mean_squares)
    else:
        full = grad.value()
        # Or XLA on CPU would write the squares, which two reductions read, to memory.
        again = grad._replace(leaf=unshared(grad.leaf)).value()
        row_mean_square = jnp.mean(full * full, axis=larger, keepdims=True)
        column_mean_square = jnp.mean(again * again, axis=smaller, keepdims=True)
    row = decay * v_row + (1 - decay) * (row_mean_square + epsilon)
    column = decay * v_col + (1 - decay) * (column_mean_square + epsilon)
    # V = R C / mean(R); its −½ is applied as two factors, never as a matrix.
    row_mean = jnp.mean(row, axis=smaller, keepdims=True)
    scaled = grad.times(jax.lax.rsqrt(row / row_mean), jax.lax.rsqrt(column))
    return scaled, row.astype(v_row.dtype), column.astype(v_col.dtype), v


def clip_part(threshold: jax.typing.ArrayLike) -> Part:
    """Divides each leaf by max(1, RMS/threshold), as ``optax.clip_by_block_rms``."""
    return Part(
        optax.init_empty_state, lambda updates, state: None, _clip, (threshold,)
    )


def _clip(
    plan: None,
    leaves: Sequence[ScaledLeaf],
    state: optax.EmptyState,
    on_sketch: OnSketch,
    threshold: Any,
) -> tuple[list[ScaledLeaf], optax.EmptyState]:
    del plan, on_sketch
    return [leaf._replace(threshold=threshold) for leaf in leaves], state
