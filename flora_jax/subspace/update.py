"""One update inside a subspace: all leaves into it, and out of it again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flora_jax.leaves import trees as _state
from flora_jax.leaves.plan import LeafPlan
from flora_jax.transforms.parts import ScaledLeaf
from flora_jax.leaves.moments import find_moments
from flora_jax.subspace.basis import Subspace
from flora_jax.subspace.transports import moments_of, with_moments
from flora_jax.sketching.watch import Sketched, note


def enter_subspace(
    subspace: Subspace,
    plans: Sequence[LeafPlan],
    updates: Any,
    state: Any,
    betas: Any,
) -> tuple[Any, list[jax.Array], Any]:
    """Tree of sketches, stored bases, and inner's state, all in this step's basis."""
    shapes = [plan.state_shape for plan in plans]
    _match(subspace, plans, state, shapes)
    kinds, moments = [], []
    if subspace.transport != "keep":
        kinds, moments = moments_of(state.inner, plans, subspace.transport)
    stored, error = jax.tree.leaves(state.basis), jax.tree.leaves(state.error)
    # In the boxes that init gave to inner: a sketch has other axis names than its leaf.
    boxes = _state.zeros_tree(updates, shapes, jnp.float32)
    like = jax.tree.leaves(boxes)

    def enter(
        grads: Any, error: Any, stored: Any, moments: Any, root: Any, i: Any, betas: Any
    ) -> Any:
        whole = _corrected(plans, grads, error)
        stored, moments = subspace.refresh(
            plans, kinds, whole, stored, moments, root, i, betas
        )
        drawn = subspace.bases(plans, root, i, stored)
        # Once more, so that how a basis is chosen on a mesh does not decide where the
        # sketches lie; on one device the compiler makes one of both.
        grads = _corrected(plans, grads, error)
        sketches = []
        for plan, basis, grad in zip(plans, drawn, map(ScaledLeaf, grads), strict=True):
            new = subspace.sketch(plan, basis, grad)
            note(
                plan, functools.partial(Sketched, subspace, plan, basis, grad, new, new)
            )
            sketches.append(new)
        return sketches, stored, moments

    sketches, stored, moments = _state.run_sharded(
        enter,
        (like, stored, moments),
        jax.tree.leaves(updates),
        error,
        stored,
        moments,
        state.key,
        state.count,
        betas,
    )
    inner = with_moments(state.inner, moments) if moments else state.inner
    return _state.rebuild(boxes, sketches), stored, inner


def leave_subspace(
    step: Callable[..., Any],
    subspace: Subspace,
    plans: Sequence[LeafPlan],
    updates: Any,
    state: Any,
    found: tuple[list[jax.Array], list[jax.Array], list[jax.Array]],
    settings: tuple[Any, Any, Any],
) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
    """The updates in the gradients' dtypes, the limiter's norms and the new error."""

    def leave(
        grads: Any, found: Any, limits: Any, error: Any, root: Any, i: Any, numbers: Any
    ) -> Any:
        stored, sketches, directions = found
        scale, limiter, betas = numbers
        whole = _corrected(plans, grads, error)
        drawn = subspace.bases(plans, root, i, stored)
        correction = _correction(betas, i)
        pairs = [
            step(*leaf, limit, scale, limiter, correction)
            for *leaf, limit in zip(
                plans,
                drawn,
                whole,
                sketches,
                directions,
                limits or [None] * len(plans),
                strict=True,
            )
        ]
        if error:
            error = [
                old if plan.dense_reason else grad - subspace.unsketch(plan, basis, r)
                for plan, basis, grad, r, old in zip(
                    plans, drawn, whole, sketches, error, strict=True
                )
            ]
        cast = [
            update.astype(grad.dtype)
            for (update, _), grad in zip(pairs, grads, strict=True)
        ]
        return cast, [limit for _, limit in pairs] if limits else [], error

    grads = jax.tree.leaves(updates)
    limits, error = jax.tree.leaves(state.limiter), jax.tree.leaves(state.error)
    return _state.run_sharded(
        leave,
        (grads, limits, error),
        grads,
        found,
        limits,
        error,
        state.key,
        state.count,
        settings,
    )


def _corrected(
    plans: Sequence[LeafPlan], grads: Sequence[jax.Array], error: Sequence[jax.Array]
) -> list[jax.Array]:
    """The gradients with what earlier sketches have left out."""
    if not error:
        return list(grads)
    return [
        grad if plan.dense_reason else grad.astype(jnp.float32) + left
        for plan, grad, left in zip(plans, grads, error, strict=True)
    ]


def _correction(betas: tuple[Any, Any] | None, count: Any) -> Any:
    """√(1−β2^t)/(1−β1^t), by which debiasing multiplies Adam's direction, at step t."""
    if betas is None:
        return 1.0
    t = optax.safe_increment(count)
    one, two = (1 - jnp.asarray(beta, jnp.float32) ** t for beta in betas)
    return jnp.sqrt(two) / one


def _match(
    subspace: Subspace, plans: Sequence[LeafPlan], state: Any, shapes: Sequence[Any]
) -> None:
    """Raises unless the state's trees are those of these gradients."""
    name = subspace.name

    for field, tree in zip(*find_moments(state.inner), strict=True):
        nodes = jax.tree.leaves(tree, is_leaf=_state.is_masked)
        if not any(map(_state.is_masked, nodes)):
            _state.matching_leaves(name, f"inner.{field}", tree, plans, shapes)
    for field, wanted in subspace.shapes(plans).items():
        tree = getattr(state, field)
        if jax.tree.leaves(tree):
            _state.matching_leaves(name, field, tree, plans, wanted)
