"""A chain whose updates come back in the gradients' dtype: how recipes are built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import optax

from flora_jax.transforms.parts import Part, run_parts


def recipe(
    parts: Sequence[Part],
    *transformations: optax.GradientTransformation,
    params_for: str = "",
) -> optax.GradientTransformationExtraArgs:
    """Chains parts, then transformations, and casts to the gradients' dtype.

    Some of optax's transformations promote their updates to the parameters' dtype;
    ``optax.apply_if_finite`` and ``optax.MultiSteps`` rely on that of the gradients.

    Args:
      parts: applied first, in this order and as one.
      *transformations: applied next, in this order.
      params_for: what the chain needs ``params`` for, or empty if it does not.

    Returns:
      The gradient transformation; its state is that of ``optax.chain`` of all, so that
      a recipe and the chain that it stands for read each other's checkpoints.

    Raises:
      TypeError: from update, if ``state`` is none.
      ValueError: from update, if ``params`` are needed and missing.
    """
    rest = optax.with_extra_args_support(optax.chain(*transformations))

    def init_fn(params: Any) -> tuple[Any, ...]:
        states = []
        for part in parts:  # No comprehension: its frame would shift warnings.
            states.append(part.init(params))
        return (*states, *cast(Any, rest.init(params)))

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, tuple[Any, ...]]:
        if params_for and params is None:
            raise ValueError(
                f"`params` must be given for {params_for}, got params=None; call"
                " tx.update(grads, state, params)"
            )
        if not isinstance(state, tuple):
            raise TypeError(
                f"`state` must be what tx.init returned, got {type(state).__name__};"
                " call tx.update(grads, state, params)"
            )
        inner, outer = state[: len(parts)], state[len(parts) :]
        new_updates = updates
        if parts:
            new_updates, inner = run_parts(parts, updates, inner)
        new_updates, outer = rest.update(new_updates, outer, params, **extra_args)
        states = (*inner, *cast(Any, outer))
        return optax.tree.cast_like(new_updates, updates), states

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
