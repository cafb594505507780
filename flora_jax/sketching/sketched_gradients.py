"""Gradients of which some leaves are sketches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax._typing import PyTree
from flora_jax.leaves.plan import LeafPlan
from flora_jax.sketching.sketch import Sketch


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
      sketch: static; how they are sketched.
      name: static; the transformation that they are sketched for.
    """

    tree: PyTree
    plans: tuple[LeafPlan, ...] = dataclasses.field(metadata={"static": True})
    like: tuple[Any, ...] = dataclasses.field(metadata={"static": True})
    sketch: Sketch = dataclasses.field(metadata={"static": True})
    name: str = dataclasses.field(metadata={"static": True})

    def shapes(self) -> PyTree:
        """The tree of shapes and dtypes that the gradients would have."""
        return jax.tree.unflatten(jax.tree.structure(self.tree), self.like)

    def global_norm(self) -> jax.Array:
        """Estimates the norm of all gradients together, for logs and clipping.

        The square of it, Σ‖C‖² (times m/r for isometric sketches) over the sketched
        leaves and ‖G‖² over the dense ones, is an unbiased estimate of the square of
        the norm; its root is a little less on average. A clip by it is a clip by an
        estimate: ``optax.clip_by_global_norm`` takes it, for unbiased projections.

        Returns:
          A float32 scalar.
        """
        isometric = getattr(self.sketch.projection, "normalization", "") == "isometric"
        total = jnp.float32(0)
        for plan, leaf in zip(self.plans, jax.tree.leaves(self.tree), strict=True):
            square = jnp.sum(jnp.square(leaf.astype(jnp.float32)))
            if isometric and not plan.dense:
                square = square * (plan.width / plan.rank)
            total = total + square
        return jnp.sqrt(total)

    def check(self, name: str, sketch: Sketch, plans: Sequence[LeafPlan]) -> None:
        """Raises unless the transformation that is given them sketches as they do.

        Args:
          name: the transformation.
          sketch: its sketch.
          plans: its plans.

        Raises:
          ValueError: naming the first difference.
        """
        if name != self.name:
            raise ValueError(
                f"`updates` of {name} are sketches for {self.name}, whose projections"
                f" are others; give sketched_value_and_grad the state of {name}"
            )
        # What else a sketch says acts through the plans.
        for what in ("projection", "key_data"):
            ours, theirs = getattr(self.sketch, what), getattr(sketch, what)
            if np.any(ours != theirs):
                raise ValueError(
                    f"`updates` of {name} were sketched with {what} {ours}, but it has"
                    f" {theirs}; give both the same Sketch"
                )
        for ours, theirs in zip(self.plans, plans, strict=True):  # Of the same leaves.
            if ours != theirs:
                raise ValueError(
                    f"`updates` of {name} have leaf {ours.path!r} planned as"
                    f" {_differing(ours, theirs)}, but its own plan is"
                    f" {_differing(theirs, ours)}; give both the same Sketch"
                )


def _differing(plan: LeafPlan, other: LeafPlan) -> str:
    """The fields of a plan that differ from another's."""
    theirs = dataclasses.asdict(other)
    ours = dataclasses.asdict(plan).items()
    return ", ".join(f"{name}={x!r}" for name, x in ours if x != theirs[name])


def gradient_shapes(updates: PyTree) -> PyTree:
    """Gradients, or the shapes of those that sketches stand for."""
    return updates.shapes() if isinstance(updates, SketchedGradients) else updates


def refuse_sketches(
    name: str, gradients: PyTree, why: str, argument: str = "updates"
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
