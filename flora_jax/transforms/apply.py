"""Applies updates: with stochastic rounding, or where they are computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flora_jax._typing import KeyData, KeyLike, PyTree
from flora_jax.leaves.in_place import APPLY, InPlace
from flora_jax.leaves.rounding import add_update, leaf_roundings
from flora_jax.leaves.trees import run_sharded
from flora_jax.random.keys import raw_key


def apply_updates(params: PyTree, updates: PyTree, key: KeyLike) -> PyTree:
    r"""``optax.apply_updates``, with bfloat16 parameters rounded stochastically.

    bfloat16 has 8 bits of precision: with rounding to nearest an update below
    :math:`2^{-9}|p|` leaves the parameter p unchanged, at every step. Here p + u is
    computed in float32 and rounded at random to one of its two neighbours
    :math:`a \le p + u \le b`:

    .. math:: P(b) = \frac{p + u - a}{b - a}, \qquad E[p'] = p + u,

    so that updates are unbiased, with a variance of at most :math:`(b - a)^2/4`. Values
    that bfloat16 represents are exact. Sums beyond its largest finite value, 3.4e38,
    are rounded to nearest; infinities and NaN propagate. Leaves of other dtypes,
    float16 included, are updated as by optax.

    The random bits are a function of the key, the leaf's path and the element's index:
    they are the same on all hardware, on any mesh, and if the layers of a stack are
    updated one by one. Inside ``jax.shard_map`` a device's shard counts as the leaf.
    Use a new key for each update.

    Memory: no elements; the bits are computed where they are used, one hash of 20
    rounds per element.

    Args:
      params: the parameters, arrays of any shapes.
      updates: of the same structure and shapes.
      key: an int seed, a typed threefry2x32 key, or its key data; another one at each
        step, such as ``jax.random.fold_in(key, step)``. It may be that of a sketch.

    Returns:
      The new parameters, of the same structure, shapes and dtypes.

    Raises:
      TypeError: if ``key`` is not a key.
      ValueError: if ``key`` is an int out of range, or the trees differ.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import flora_jax as fj
      >>> params = {"w": jnp.ones(1000, jnp.bfloat16)}
      >>> updates = {"w": jnp.full(1000, 1e-3)}
      >>> nearest = stochastic = params
      >>> for step in range(10):
      ...   nearest = optax.apply_updates(nearest, updates)
      ...   key = jax.random.fold_in(jax.random.key(0), step)
      ...   stochastic = fj.apply_updates(stochastic, updates, key)
      >>> print(f"{jnp.mean(nearest['w'].astype(jnp.float32)):.3f}")
      1.000
      >>> print(f"{jnp.mean(stochastic['w'].astype(jnp.float32)):.3f}")
      1.010

    References:
      Gupta et al., `Deep Learning with Limited Numerical Precision
      <https://arxiv.org/abs/1502.02551>`_, 2015

      Zamirai et al., `Revisiting BFloat16 Training
      <https://arxiv.org/abs/2010.06192>`_, 2020
    """
    # Parameters that are None stay so, whatever their updates are, as by optax.
    updates = jax.tree.map(
        lambda param, update: None if param is None else update,
        params,
        updates,
        is_leaf=lambda x: x is None,
    )
    leaves, treedef = jax.tree.flatten(params)
    own = treedef.flatten_up_to(updates)
    roundings = leaf_roundings(jnp.asarray(raw_key(key)), params)

    def add(params: Any, updates: Any, roundings: Any) -> list[jax.Array]:
        return list(map(add_update, params, updates, roundings))

    new = run_sharded(add, leaves, leaves, own, roundings)
    return jax.tree.unflatten(treedef, new)


def update_and_apply(
    tx: optax.GradientTransformation,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    *,
    key: KeyLike | None = None,
    **extra_args: Any,
) -> tuple[PyTree, PyTree]:
    """``tx.update`` and ``optax.apply_updates`` in one call, with less memory.

    The values are those of the two calls, with a key those of
    :func:`flora_jax.apply_updates`. But the recipes of this package and
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
      key: of the stochastic rounding of bfloat16 parameters, a new one for each step,
        see :func:`flora_jax.apply_updates`; None rounds to nearest, as optax does.
      **extra_args: for ``tx.update``; an argument called ``key`` does not reach it.

    Returns:
      The new parameters and the new state.

    Raises:
      TypeError: if an accumulation is followed or wrapped by what changes its updates,
        ``tx.update`` is jitted, or ``key`` is not a key.
      ValueError: if ``key`` is an int out of range.

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
    root = None if key is None else jnp.asarray(raw_key(key))
    return apply_updates_of(tx, grads, state, params, root, extra_args, is_strict=True)


def apply_updates_of(
    tx: optax.GradientTransformation,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    key: KeyData | None,
    extra_args: Mapping[str, Any],
    is_strict: bool,
    sources: Sequence[Any] | None = None,
) -> tuple[PyTree, PyTree]:
    """:func:`update_and_apply`; if not strict, also of what takes no request.

    ``key`` is key data. ``sources`` are what gradients were expanded from, if they
    were.
    """
    update = optax.with_extra_args_support(tx).update
    # Or a recipe that applies in vain would tell of its sketches twice.
    for_recipes = extra_args.get("on_sketch") is None
    request = InPlace(params, for_recipes=for_recipes, key=key)
    if sources is not None:
        request.expanded = jax.tree.leaves(grads), sources
    try:
        updates, new = update(grads, state, params, **{APPLY: request}, **extra_args)
        if updates is request:
            return request.params, new
        if request.is_required:
            raise _not_last()
        if request.params is None:
            return _applied(params, updates, key), new
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
    return _applied(params, updates, key), new


def _applied(params: PyTree, updates: PyTree, key: KeyData | None) -> PyTree:
    if key is None:
        return optax.apply_updates(params, updates)
    return apply_updates(params, updates, key)


def _not_last() -> TypeError:
    return TypeError(
        "`tx` of update_and_apply goes on after compressed_accumulation, whose updates"
        " are applied already; move what follows or wraps it into its `inner`, or call"
        " tx.update and optax.apply_updates"
    )
