"""An update and its application to the parameters in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax

from flora_jax._typing import PyTree
from flora_jax.leaves.in_place import APPLY, InPlace


def update_and_apply(
    tx: optax.GradientTransformation,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    **extra_args: Any,
) -> tuple[PyTree, PyTree]:
    """``tx.update`` and ``optax.apply_updates`` in one call, with less memory.

    The values are those of the two calls. But the recipes of this package and
    :func:`flora_jax.compressed_accumulation` apply their updates where they compute
    them: no tree of updates, of the size of the parameters, exists between the two. On
    a mesh (under ``jax.set_mesh``), and by an accumulation around
    :func:`flora_jax.adafactor`, stacked leaves are updated layer by layer, and a
    micro-step that ends no cycle moves neither zeros nor parameters. Donate parameters
    and state. An accumulation applied in this way cannot be differentiated in reverse
    mode.

    Args:
      tx: the transformation, not jitted. An accumulation must be the outermost
        transformation, or the last of a chain; of a recipe that is neither the updates
        are applied as by optax.
      grads: gradients, or what the transformation takes in their place.
      state: its state.
      params: the parameters.
      **extra_args: for ``tx.update``.

    Returns:
      The new parameters and the new state.

    Raises:
      TypeError: if an accumulation is followed or wrapped by what changes its updates,
        or ``tx.update`` is jitted.

    Example:
      >>> import functools
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import flora_jax as fj
      >>> params = {"w": jnp.ones((256, 512))}
      >>> tx = fj.compressed_accumulation(fj.adafactor(1e-2), 16, fj.Sketch(32))
      >>> @functools.partial(jax.jit, donate_argnums=(0, 1))
      ... def step(params, state, grads):
      ...   return fj.update_and_apply(tx, grads, state, params)
      >>> grads = {"w": jnp.ones((256, 512))}
      >>> params, state = step(params, tx.init(params), grads)
    """
    return apply_updates_of(tx, grads, state, params, extra_args, is_strict=True)


def apply_updates_of(
    tx: optax.GradientTransformation,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    extra_args: Mapping[str, Any],
    is_strict: bool,
    sources: Sequence[Any] | None = None,
) -> tuple[PyTree, PyTree]:
    """:func:`update_and_apply`; if not strict, also of what takes no request.

    ``sources`` are what gradients were expanded from, if they were.
    """
    update = optax.with_extra_args_support(tx).update
    # Or a recipe that applies in vain would tell of its sketches twice.
    request = InPlace(params, for_recipes=extra_args.get("on_sketch") is None)
    if sources is not None:
        request.expanded = jax.tree.leaves(grads), sources
    try:
        updates, new = update(grads, state, params, **{APPLY: request}, **extra_args)
        if updates is request:
            return request.params, new
        if request.is_required:
            raise _not_last()
        if request.params is None:
            return optax.apply_updates(params, updates), new
    except (AttributeError, TypeError, ValueError) as error:
        is_refused = APPLY in str(error)
        if is_refused and is_strict:
            raise TypeError(
                "`tx` of update_and_apply must not be jitted and must take extra"
                f" arguments, got {tx}; jit the step around it, or call tx.update and"
                " optax.apply_updates"
            ) from error
        # An error before the accumulation has applied its updates is its own.
        if request.is_required and request.params is not None:
            raise _not_last() from error
        if request.params is None and not is_refused:
            raise
    # What follows a recipe, or wraps it, cannot change what is applied already.
    updates, new = update(grads, state, params, **extra_args)
    return optax.apply_updates(params, updates), new


def _not_last() -> TypeError:
    return TypeError(
        "`tx` of update_and_apply goes on after compressed_accumulation, whose updates"
        " are applied already; move what follows or wraps it into its `inner`, or call"
        " tx.update and optax.apply_updates"
    )
