"""What becomes of an inner optimizer's moments when the basis changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from flora_jax.leaves.plan import LeafPlan
from flora_jax.leaves.moments import (
    FIRST,
    KINDS,
    SECOND,
    find_moments,
    replace_moments,
)
from flora_jax.sketching.sketcher import moved_sketch

if TYPE_CHECKING:
    from jaxtyping import Array, Float

TRANSPORTS = ("keep", "reset", "ldadam", "squared", "rms")


def moments_of(
    state: Any, plans: Sequence[LeafPlan], transport: str
) -> tuple[list[str], list[list[jax.Array]]]:
    """Kinds and leaves of the moments inside an inner state.

    Args:
      state: state of the inner transformation.
      plans: plans of the gradient leaves, in flattening order.
      transport: what the moments are wanted for.

    Returns:
      One kind and one list of arrays, in the plans' order, per tree of moments.

    Raises:
      ValueError: if there are none, or if their arrays are not those of the sketches.
    """
    names, trees = find_moments(state)
    moments = [jax.tree.leaves(tree) for tree in trees]
    wanted = [plan.state_shape for plan in plans]
    for name, leaves in zip(names, moments, strict=True):
        # Eight bits are codes, which are read with scales that stand elsewhere.
        plain = all(leaf.dtype.itemsize > 1 for leaf in leaves)
        if [leaf.shape for leaf in leaves] != wanted or not plain:
            raise ValueError(
                f"`transport` {transport!r} moves moments that are kept like the"
                f" sketches, got an `inner` whose {name!r} is not: use 'keep', and"
                " quantise outside, by quantize_state(scale_in_subspace(...))"
            )
    kept, moved = (
        sum(map(_is_tree_leaf, jax.tree.leaves(tree))) for tree in (state, moments)
    )
    if moments and kept > moved:
        raise ValueError(
            f"`transport` {transport!r} moves the fields {', '.join(KINDS)} of"
            f" `inner`, got the state {type(state).__name__}, which keeps other arrays"
            " too: they would stay in the old basis; use 'keep'"
        )
    if not moments and plans:
        raise ValueError(
            f"`transport` {transport!r} needs an `inner` with moments in fields named"
            f" {', '.join(KINDS)}, got the state {type(state).__name__}; use 'keep'"
        )
    return [KINDS[name] for name in names], moments


def _is_tree_leaf(leaf: Any) -> bool:
    """Whether an array of a state is no counter, key or description."""
    return leaf.ndim > 0 and leaf.dtype != jnp.uint32


def with_moments(state: Any, moments: Sequence[Sequence[jax.Array]]) -> Any:
    """The inner state with the leaves that :func:`moments_of` found replaced."""
    _, trees = find_moments(state)
    new = [
        jax.tree.unflatten(jax.tree.structure(tree), leaves)
        for tree, leaves in zip(trees, moments, strict=True)
    ]
    return replace_moments(state, new)


def transport_leaf(
    transport: str,
    kinds: Sequence[str],
    plan: LeafPlan,
    matrix: Float[Array, "*batch r r"],
    moments: Sequence[Float[Array, "..."]],
    fresh: Float[Array, "..."] | None,
    count: Any,
    betas: tuple[Any, Any] | None,
) -> list[jax.Array]:
    """One leaf's moments in the new basis; see ``scale_in_subspace`` for the rules.

    Args:
      transport: one of TRANSPORTS but ``"keep"``.
      kinds: what each array of ``moments`` is.
      plan: the leaf's plan.
      matrix: S S′ᵀ, from the old basis to the new.
      moments: in the state's shape.
      fresh: the gradient's sketch in the new basis, for ``"reset"``.
      count: number t of updates that the moments have seen.
      betas: decays of the first and the second moment, or None without debiasing.

    Returns:
      The moments, in their shapes and dtypes.
    """
    # What m and v are divided by to be without bias; 1 while both are zero.
    one, two = (
        1 - jnp.asarray(beta, jnp.float32) ** jnp.maximum(count, 1)
        for beta in betas or (0.0, 0.0)
    )
    new, first = [], jnp.zeros((), jnp.float32)
    for kind, moment in zip(kinds, moments, strict=True):
        x = moment.astype(jnp.float32)
        if transport == "reset":
            assert fresh is not None
            start = {FIRST: one * fresh, SECOND: two * fresh**2}
            moved = jnp.where(count > 0, start.get(kind, 0.0), x)
        elif kind != SECOND:
            moved = moved_sketch(plan, matrix, x)
            if transport == "rms":
                moved = moved * (plan.width / plan.rank) ** 0.5
        elif transport == "ldadam":
            mean = jnp.broadcast_to(first / one, x.shape)
            spread = moved_sketch(plan, matrix**2, x / two - mean**2)
            moved = two * jnp.abs(spread + moved_sketch(plan, matrix, mean) ** 2)
        else:
            weights = matrix**2
            if transport == "rms":  # Each new direction averages the old ones.
                total = weights.sum(-2, keepdims=True)
                weights = weights / jnp.where(total > 0, total, 1.0)
            moved = moved_sketch(plan, weights, x)
        if kind == FIRST:
            first = x
        new.append(moved.astype(moment.dtype))
    return new
