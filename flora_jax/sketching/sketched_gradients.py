"""Gradients of which some leaves are sketches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.leaves import LeafPlan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SketchedGradients:
    """What :func:`flora_jax.sketched_value_and_grad` returns in place of gradients.

    A pytree of arrays: it can be averaged over devices, scaled, and checked for NaN.

    Attributes:
      tree: of the gradients' structure: sketches, float32 in the state's shape, and
        gradients of dense leaves.
      plans: static plans of the leaves, in flattening order.
      like: static shapes and dtypes of the gradients.
      projection: static; what the sketches were made with.
      name: static; the transformation whose projections they are.
    """

    tree: Any
    plans: tuple[LeafPlan, ...] = dataclasses.field(metadata={"static": True})
    like: tuple[Any, ...] = dataclasses.field(metadata={"static": True})
    projection: Any = dataclasses.field(metadata={"static": True})
    name: str = dataclasses.field(metadata={"static": True})

    def shapes(self) -> Any:
        """The tree of shapes and dtypes that the gradients would have."""
        return jax.tree.unflatten(jax.tree.structure(self.tree), self.like)

    def global_norm(self) -> jax.Array:
        """Estimates the norm of all gradients together, for logs and clipping.

        The square of it, Σ‖C‖² (times m/r for isometric sketches) over the sketched
        leaves and ‖G‖² over the dense ones, is an unbiased estimate of the square of
        the norm; its root is a little less on average. A clip by it is a clip by an
        estimate: ``optax.clip_by_global_norm`` takes it, for unbiased projections.

        Returns:
          A float32 number.
        """
        total = jnp.float32(0)
        for plan, leaf in zip(self.plans, jax.tree.leaves(self.tree), strict=True):
            size = jnp.sum(jnp.square(leaf.astype(jnp.float32)))
            if (
                plan.dense_reason is None
                and self.projection.normalization == "isometric"
            ):
                size = size * (plan.width / plan.rank)
            total = total + size
        return jnp.sqrt(total)

    def check(self, name: str, plans: Sequence[LeafPlan], projection: Any) -> None:
        """Raises unless a consumer means the same by a sketch.

        Args:
          name: the transformation that is given the sketches.
          plans: its plans.
          projection: its projection.

        Raises:
          ValueError: naming the first difference.
        """
        if name != self.name:
            raise ValueError(
                f"`updates` of {name} are sketches for {self.name}, whose projections"
                f" are others; give sketched_value_and_grad transformation={name!r}"
            )
        if projection != self.projection:
            raise ValueError(
                f"`updates` of {name} are sketches by {self.projection}, but it uses"
                f" {projection}; give both the same `projection`"
            )
        for ours, theirs in zip(self.plans, plans, strict=True):  # Of the same leaves.
            if ours != theirs:
                raise ValueError(
                    f"`updates` of {name} have leaf {ours.path!r} planned as"
                    f" {_where_not(ours, theirs)}, but its own plan is"
                    f" {_where_not(theirs, ours)}; give both the same rank and rules"
                )


def _where_not(plan: LeafPlan, other: LeafPlan) -> str:
    """The fields in which a plan differs from another."""
    pairs = dataclasses.asdict(plan), dataclasses.asdict(other)
    return ", ".join(f"{k}={v!r}" for k, v in pairs[0].items() if pairs[1][k] != v)


def gradient_shapes(updates: Any) -> Any:
    """Gradients, or the shapes of those that sketches stand for."""
    return updates.shapes() if isinstance(updates, SketchedGradients) else updates


def refuse_sketches(
    name: str, gradients: Any, why: str, argument: str = "updates"
) -> None:
    """Raises if a transformation is given sketches that needs gradients.

    Args:
      name: the transformation.
      gradients: gradients, or :class:`SketchedGradients`.
      why: what it needs them for.
      argument: its name for the gradients.

    Raises:
      TypeError: for sketches.
    """
    if isinstance(gradients, SketchedGradients):
        raise TypeError(
            f"`{argument}` of {name} are SketchedGradients, but {why}; use jax.grad, or"
            " give the sketches to compressed_accumulation or compressed_momentum"
        )
