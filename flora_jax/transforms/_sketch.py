"""One leaf to its sketch and back: a plan, a projection and a key."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from flora_jax import _keys
from flora_jax._plan import LeafPlan
from flora_jax._rules import LeafRules
from flora_jax._spec import make_spec
from flora_jax.projections import Projection

if TYPE_CHECKING:
    from jaxtyping import Array, Float, PRNGKeyArray


@dataclasses.dataclass(frozen=True)
class Sketcher:
    """The settings that decide what a sketch means.

    Attributes:
      name: the transformation's name, the salt of its keys.
      rules: which leaves are sketched, and on which side.
      projection: how.
    """

    name: str
    rules: LeafRules
    projection: Projection

    def __post_init__(self) -> None:
        """Raises TypeError if the projection is none."""
        if not isinstance(self.projection, Projection):
            raise TypeError(
                f"`projection` must be a flora_jax projection, got {self.projection!r};"
                " pass an instance such as flora_jax.Gaussian()"
            )

    def key(self, plan: LeafPlan, root: jax.Array, epoch: Any) -> PRNGKeyArray:
        """The key of one leaf's projection in one epoch."""
        return _keys.leaf_key(root, self.name, plan.path, epoch)

    def sketch(
        self, plan: LeafPlan, key: PRNGKeyArray, leaf: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Sketches a leaf: float32, in the state's shape; dense leaves pass."""
        leaf = leaf.astype(jnp.float32)
        if plan.dense_reason is not None:
            return leaf
        matrix = plan.fold(leaf)
        sketch = self.projection.sketch(key, matrix, plan.rank, plan.axis)
        return plan.unfold(sketch, plan.state_shape)

    def unsketch(
        self, plan: LeafPlan, key: PRNGKeyArray, sketch: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Estimates a leaf from its sketch: float32, in the leaf's shape."""
        sketch = sketch.astype(jnp.float32)
        if plan.dense_reason is not None:
            return sketch
        matrix = plan.fold(sketch)
        estimate = self.projection.unsketch(key, matrix, plan.width, plan.axis)
        return plan.unfold(estimate, plan.shape)

    def spec(self, root: Any, **settings: Any) -> jax.Array:
        """The ``spec`` of a state that holds such sketches."""
        rules, axes = self.rules, self.rules.weight_dimension_numbers
        return make_spec(
            self.name,
            root,
            projection=self.projection,
            rank=rules.rank if isinstance(rules.rank, numbers.Integral) else "by leaf",
            side=rules.side,
            min_dim_size=rules.min_dim_size,
            max_aspect_ratio=f"{rules.max_aspect_ratio:g}",
            weight_dimension_numbers="callable" if callable(axes) else axes,
            **settings,
        )


def accumulate(
    sketcher: Sketcher,
    plans: Sequence[LeafPlan],
    use_mean: bool,
    grads: Sequence[jax.Array],
    acc: Sequence[jax.Array],
    root: jax.Array,
    i: Any,
    cycle: Any,
) -> list[jax.Array]:
    """Adds micro-step i of a cycle to the accumulators of all leaves."""
    return [
        accumulate_leaf(
            sketcher, plan, sketcher.key(plan, root, cycle), use_mean, i, grad, leaf
        )
        for plan, grad, leaf in zip(plans, grads, acc, strict=True)
    ]


def accumulate_leaf(
    sketcher: Sketcher,
    plan: LeafPlan,
    key: PRNGKeyArray,
    use_mean: bool,
    i: Any,
    grad: Float[Array, "..."],
    acc: Float[Array, "..."],
) -> Float[Array, "..."]:
    """One leaf's running mean or sum of sketches, after micro-step i."""
    total = acc.astype(jnp.float32)
    fresh = sketcher.sketch(plan, key, grad)
    total = total + ((fresh - total) / (i + 1) if use_mean else fresh)
    return total.astype(acc.dtype)


def estimate(
    sketcher: Sketcher,
    plans: Sequence[LeafPlan],
    acc: Sequence[jax.Array],
    root: jax.Array,
    cycle: Any,
) -> list[jax.Array]:
    """What the accumulators of all leaves stand for: float32, in the leaves' shapes."""
    return [
        sketcher.unsketch(plan, sketcher.key(plan, root, cycle), leaf)
        for plan, leaf in zip(plans, acc, strict=True)
    ]
