"""Transformations that treat each leaf by itself, and chains of them that fuse."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flora_jax.leaves import trees as _state
from flora_jax.sketching.sketched_gradients import gradient_shapes

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def widened(leaf: Float[Array, "..."]) -> Float[Array, "..."]:
    """The leaf in float32, not shared with whatever else reads it in float32.

    XLA would widen a bfloat16 leaf once and write it to memory for all of its readers;
    behind a barrier each of them widens what it reads as it goes.
    """
    if leaf.dtype != jnp.float32:
        leaf = jax.lax.optimization_barrier(leaf)
    return leaf.astype(jnp.float32)


class ScaledLeaf(NamedTuple):
    """A leaf times factors that are not multiplied out.

    What Adafactor does to a gradient is a product with a column, a row and a number. A
    sketch can apply them to the projection and to its result, so that the scaled
    gradient is never written to memory.

    Attributes:
      leaf: an array of any float dtype.
      factors: float32 arrays that broadcast to it: scalars, or with all of its axes.
    """

    leaf: Float[Array, "..."]
    factors: tuple[jax.Array, ...] = ()

    def times(self, *factors: jax.Array) -> ScaledLeaf:
        """The leaf with more factors."""
        full = (factor.astype(jnp.float32) for factor in factors)
        return ScaledLeaf(self.leaf, (*self.factors, *full))

    def value(self) -> Float[Array, "..."]:
        """The product, float32."""
        full = widened(self.leaf)
        # From the leaf on: the factors alone may overflow where it is zero.
        return functools.reduce(operator.mul, self.factors, full)


class Part(NamedTuple):
    """A transformation without the trees around it.

    Attributes:
      init: from parameters to a state.
      plan: from updates and state to static decisions, after all checks.
      step: from those, the ScaledLeafs, a state and ``settings`` to new ones.
      settings: numbers that may be traced; ``step`` closes over no array.
    """

    init: Callable[[Any], Any]
    plan: Callable[[Any, Any], Any]
    step: Callable[..., tuple[list[ScaledLeaf], Any]]
    settings: tuple[Any, ...] = ()


def leafwise(part: Part) -> optax.GradientTransformationExtraArgs:
    """One part as a gradient transformation, with the part's own state."""

    def init_fn(params: Any) -> Any:
        return part.init(params)

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        del params, extra
        new_updates, (state,) = run_parts([part], updates, (state,))
        return new_updates, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def run_parts(
    parts: Sequence[Part], updates: Any, states: tuple[Any, ...]
) -> tuple[Any, tuple[Any, ...]]:
    """Runs parts in their order, without arrays in between.

    Equal to chaining them in float32; a chain rounds narrower gradients after each.

    Args:
      parts: applied in this order.
      updates: the gradients; SketchedGradients if the first part takes them.
      states: one per part.

    Returns:
      The updates, in the dtype of the gradients, and the new states.
    """
    plans = [part.plan(updates, old) for part, old in zip(parts, states, strict=True)]
    grads = jax.tree.leaves(updates)
    updates = gradient_shapes(updates)
    like = jax.tree.leaves(updates)
    arrays, treedef = jax.tree.flatten(states)

    def run(grads: Any, arrays: Any, settings: Any) -> tuple[Any, Any]:
        leaves = [ScaledLeaf(grad) for grad in grads]
        old = jax.tree.unflatten(treedef, arrays)
        new = []
        for part, plan, state, numbers in zip(parts, plans, old, settings, strict=True):
            leaves, state = part.step(plan, leaves, state, *numbers)
            new.append(state)
        values = [
            leaf.value().astype(each.dtype)
            for leaf, each in zip(leaves, like, strict=True)
        ]
        return values, jax.tree.leaves(new)

    values, arrays = _state.run_sharded(
        run, (like, arrays), grads, arrays, [part.settings for part in parts]
    )
    return _state.rebuild(updates, values), jax.tree.unflatten(treedef, arrays)


def clip_part(threshold: jax.typing.ArrayLike) -> Part:
    """Divides each leaf by max(1, RMS/threshold), as ``optax.clip_by_block_rms``."""

    def step(
        plan: None, leaves: list[ScaledLeaf], state: Any, threshold: Any
    ) -> tuple[list[ScaledLeaf], Any]:
        del plan
        return [clip_step(leaf, threshold) for leaf in leaves], state

    return Part(
        lambda params: optax.EmptyState(),
        lambda updates, state: None,
        step,
        (threshold,),
    )


def clip_step(leaf: ScaledLeaf, threshold: Any) -> ScaledLeaf:
    """One leaf with the factor that clips it."""
    # XLA writes to memory what two operations read, and fuses what one does: behind a
    # barrier it does not see that others need the same product, or its factors.
    again = jax.tree.map(jax.lax.optimization_barrier, leaf).value()
    rms = jnp.sqrt(jnp.mean(again * again))
    return leaf.times(1 / jnp.maximum(1.0, rms / threshold))
