"""A chain whose updates come back in the gradients' dtype: how recipes are built."""

from __future__ import annotations

from typing import Any

import optax


def chain_in_gradient_dtype(
    *transformations: optax.GradientTransformation, params_for: str = ""
) -> optax.GradientTransformationExtraArgs:
    """Chains transformations and casts the result to the gradients' dtype.

    Some of optax's transformations promote their updates to the parameters' dtype;
    ``optax.apply_if_finite`` and ``optax.MultiSteps`` rely on that of the gradients.

    Args:
      *transformations: applied in this order.
      params_for: what the chain needs ``params`` for, or empty if it does not.

    Returns:
      The gradient transformation; its state is that of ``optax.chain``.

    Raises:
      ValueError: from update, if ``params`` are needed and missing.
    """
    inner = optax.with_extra_args_support(optax.chain(*transformations))

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, Any]:
        if params_for and params is None:
            raise ValueError(
                f"`params` must be given for {params_for}, got params=None; call"
                " tx.update(grads, state, params)"
            )
        new_updates, state = inner.update(updates, state, params, **extra_args)
        return optax.tree.cast_like(new_updates, updates), state

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)
