"""The mathematics of a sketched momentum, leaf by leaf."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from flora_jax.random import keys as _keys
from flora_jax.leaves import trees as _state
from flora_jax.leaves.plan import LeafPlan
from flora_jax.projections.base import along
from flora_jax.transforms.parts import ScaledLeaf
from flora_jax.sketching.sketcher import Sketcher, moved_sketch
from flora_jax.sketching.watch import Sketched, note

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def step_all(
    sketcher: Sketcher,
    reading: str,
    resample_every: int | None,
    plans: Sequence[LeafPlan],
    leaves: Sequence[ScaledLeaf],
    state: Any,
    decay: Any,
) -> tuple[list[ScaledLeaf], Any]:
    """All leaves' updates and the new state, after a transfer where one is due."""
    count, root, momentum = state.count, state.key, jax.tree.leaves(state.momentum)
    epoch, due = 0, None
    if resample_every is not None:
        epoch, due = _keys.renewal(count, resample_every)
    drawn = sketcher.draw(plans, root, epoch)
    if due is not None:
        momentum = _transfer_where(due, sketcher, plans, momentum, root, epoch)
    pairs = [
        momentum_step(
            sketcher, plan, leaf_drawn, reading, resample_every, decay, leaf, old
        )
        for plan, leaf_drawn, leaf, old in zip(
            plans, drawn, leaves, momentum, strict=True
        )
    ]
    return [ScaledLeaf(update) for update, _ in pairs], state._replace(
        count=optax.safe_increment(count),
        momentum=_state.rebuild(state.momentum, [new for _, new in pairs]),
    )


def momentum_step(
    sketcher: Sketcher,
    plan: LeafPlan,
    drawn: Any,
    reading: str,
    resample_every: int | None,
    decay: Any,
    grad: ScaledLeaf,
    momentum: Float[Array, "..."],
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """One leaf's update (float32) and new momentum (state's dtype)."""
    fresh = sketcher.sketch(plan, drawn, grad)
    new = decay * momentum.astype(jnp.float32) + (1 - decay) * fresh

    def described() -> Sketched:
        scale = sketcher.projection.scale
        largest = largest_ratio(plan, scale, decay, resample_every)
        return Sketched(sketcher, plan, drawn, grad, fresh, new, largest)

    note(plan, described)
    if reading == "residual" and plan.dense_reason is None:
        gram = sketcher.projection.gram_diagonal(plan.rank, plan.width)
        assert gram is not None  # The factory refuses other projections.
        # C (S Sᵀ)⁻¹ S, which is G Π where C = G Sᵀ.
        missing = plan.fold(new - fresh) / along(gram, plan.axis)
        update = grad.value() + sketcher.unsketch(
            plan, drawn, plan.unfold(missing, plan.state_shape)
        )
    else:
        update = sketcher.unsketch(plan, drawn, new)
    if reading == "interpolated":
        update = decay * update + (1 - decay) * grad.value()
    return update, new.astype(momentum.dtype)


def _transfer_where(
    due: jax.Array,
    sketcher: Sketcher,
    plans: Sequence[LeafPlan],
    momentum: Sequence[jax.Array],
    root: jax.Array,
    epoch: Any,
) -> list[jax.Array]:
    """Moves the sketched leaves to the projections of ``epoch``, where that is due."""
    places = [i for i, plan in enumerate(plans) if plan.dense_reason is None]
    sketched = [plans[i] for i in places]

    def move(momentum: Any, root: jax.Array, epoch: Any) -> list[jax.Array]:
        matrices = sketcher.transfers(sketched, root, epoch)
        return [
            moved_sketch(plan, matrix, old).astype(old.dtype)
            for plan, matrix, old in zip(sketched, matrices, momentum, strict=True)
        ]

    moved = jax.lax.cond(
        due,
        move,
        lambda momentum, *_: momentum,
        [momentum[i] for i in places],
        root,
        epoch,
    )
    found = dict(zip(places, moved, strict=True))
    return [found.get(i, leaf) for i, leaf in enumerate(momentum)]


def largest_ratio(
    plan: LeafPlan, scale: str, decay: Any, resample_every: int | None
) -> jax.Array:
    """A bound on ‖M‖/‖G‖ for a stable momentum.

    κ updates with gradients of norm g take ‖M‖ to at most β^κ ‖M‖ + (1−β^κ) g, and a
    transfer multiplies it by √q: the fixed point of both.
    """
    if resample_every is None or scale == "isometric":  # Isometric transfers shrink.
        return jnp.float32(1)
    growth = (plan.width / plan.rank) ** 0.5
    kept = jnp.asarray(decay, jnp.float32) ** resample_every
    left = 1 - kept * growth
    fixed = growth * (1 - kept) / jnp.where(left > 0, left, 1.0)
    return jnp.where(left > 0, jnp.maximum(fixed, 1.0), jnp.inf)
