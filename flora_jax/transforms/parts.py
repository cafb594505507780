"""Transformations that treat each leaf by itself, and chains of them that fuse."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import optax

from flora_jax._typing import KeyData, PyTree
from flora_jax.leaves.in_place import APPLY, InPlace
from flora_jax.leaves.trees import rebuild, run_sharded
from flora_jax.sketching.sketcher import (
    Apply,
    EstimatedLeaf,
    OnSketch,
    ScaledLeaf,
    gradient_shapes,
)
from flora_jax.transforms.elementwise import Elementwise


class Part(NamedTuple):
    """A transformation without the trees around it.

    Attributes:
      init: from parameters to a state.
      plan: from updates and state to static decisions, after all checks.
      step: from those, the ScaledLeafs, a state, ``on_sketch`` and ``settings`` to new
        leaves and state; it closes over no array. EstimatedLeafs are for the last.
      settings: hyperparameters that may be traced.
    """

    init: optax.TransformInitFn
    plan: Callable[[PyTree, Any], Any]
    step: Callable[..., tuple[Sequence[ScaledLeaf | EstimatedLeaf], Any]]
    settings: tuple[Any, ...] = ()


def leafwise(part: Part) -> optax.GradientTransformationExtraArgs:
    """One part as a gradient transformation, with the part's own state."""

    def update_fn(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, Any]:
        del params
        on_sketch = extra_args.get("on_sketch")
        new_updates, (state,) = run_parts([part], updates, (state,), on_sketch)
        return new_updates, state

    return optax.GradientTransformationExtraArgs(part.init, update_fn)


def run_parts(
    parts: Sequence[Part],
    updates: PyTree,
    states: tuple[Any, ...],
    on_sketch: OnSketch = None,
    params: PyTree = None,
    in_place: InPlace | None = None,
) -> tuple[PyTree, tuple[Any, ...]]:
    """Runs parts in their order, without arrays in between.

    Equal to chaining them in float32; a chain rounds narrower gradients after each.

    Args:
      parts: applied in this order.
      updates: the gradients; SketchedGradients if the first part takes them.
      states: one per part.
      on_sketch: told of each sketch that is made; see ``SketchEvent``.
      params: the parameters, if the updates are applied to them.
      in_place: how; its ``params`` are set.

    Returns:
      The updates, in the dtype of the gradients, or ``in_place``; and the new states.
    """
    plans = [part.plan(updates, old) for part, old in zip(parts, states, strict=True)]
    grads = jax.tree.leaves(updates)
    updates = gradient_shapes(updates)
    like = jax.tree.leaves(updates)
    arrays, treedef = jax.tree.flatten(states)

    def run(
        grads: Any,
        sources: Any,
        arrays: Any,
        settings: Any,
        params: Any,
        arguments: Any,
    ) -> tuple[Any, Any]:
        pairs = zip(grads, sources, strict=True)
        leaves: Sequence[Any] = [ScaledLeaf(x, source=source) for x, source in pairs]
        old = jax.tree.unflatten(treedef, arrays)
        new = []
        for part, plan, state, own in zip(parts, plans, old, settings, strict=True):
            leaves, state = part.step(plan, leaves, state, on_sketch, *own)
            new.append(state)
        arrays = jax.tree.leaves(new)
        if in_place is None:
            dtypes = [each.dtype for each in like]
            values = [x.value().astype(d) for x, d in zip(leaves, dtypes, strict=True)]
            return values, arrays
        results = []
        for leaf, *one, each in zip(leaves, arguments, params, like, strict=True):
            apply = functools.partial(_rounded, in_place.apply, each.dtype)
            results.append(leaf.applied(apply, *one))
        return results, arrays

    settings = [part.settings for part in parts]
    own = [] if in_place is None else jax.tree.leaves(params)
    arguments, sources = [], [None] * len(grads)
    if in_place is not None:
        arguments, sources = in_place.arguments(), in_place.sources(grads)
    results, arrays = run_sharded(
        run, (own or like, arrays), grads, sources, arrays, settings, own, arguments
    )
    states = jax.tree.unflatten(treedef, arrays)
    if in_place is None:
        return rebuild(updates, results), states
    in_place.params = rebuild(params, results)
    return in_place, states


def _rounded(
    apply: Apply, dtype: Any, arguments: Any, update: jax.Array, param: jax.Array
) -> jax.Array:
    """The new parameter, from an update in the dtype of the gradient."""
    return apply(arguments, update.astype(dtype), param)


def chain_parts(
    parts: Sequence[Part],
    *transformations: optax.GradientTransformation,
    last: Sequence[Elementwise],
    params_for: str = "",
) -> optax.GradientTransformationExtraArgs:
    """Chains parts, then transformations, and casts to the gradients' dtype.

    Some of optax's transformations promote their updates to the parameters' dtype;
    ``optax.apply_if_finite`` and ``optax.MultiSteps`` rely on that of the gradients.

    Args:
      parts: applied first, in this order and as one.
      *transformations: applied next, in this order.
      last: applied last; by :func:`flora_jax.update_and_apply` to parts of a leaf.
      params_for: what the chain needs ``params`` for, or empty if it does not.

    Returns:
      The gradient transformation; its state is that of ``optax.chain`` of all, so that
      a recipe and the chain that it stands for read each other's checkpoints.

    Raises:
      TypeError: from update, if ``state`` is not what init returned.
      ValueError: from update, if ``params`` are needed and missing.
    """
    first, final = None, optax.chain(*(each.tx for each in last))
    if transformations:
        first = optax.with_extra_args_support(optax.chain(*transformations))
    # Others would go on to change what is applied in place.
    applies = not transformations if parts else len(transformations) == 1

    def init_fn(params: PyTree) -> tuple[Any, ...]:
        inner = [part.init(params) for part in parts]
        outer = () if first is None else first.init(params)
        return (*inner, *cast(Any, outer), *cast(Any, final.init(params)))

    def update_fn(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, tuple[Any, ...]]:
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
        request = extra_args.pop(APPLY, None)
        start, end = len(parts), len(parts) + len(transformations)
        inner, outer, ends = state[:start], state[start:end], state[end:]
        own = None
        if request is not None and applies and request.is_for_recipe(params):
            own = _request(last, ends, params, request.key)
            own.expanded = request.expanded
        new_updates = updates
        if parts:
            on_sketch = extra_args.get("on_sketch")
            new_updates, inner = run_parts(
                parts, updates, inner, on_sketch, params, own
            )
        if first is not None:
            given = {} if own is None else {APPLY: own}
            new_updates, outer = first.update(
                new_updates, outer, params, **given, **extra_args
            )
        if request is not None and own is not None and own.params is not None:
            # The updates are dead code: the states alone are wanted.
            zeros = optax.tree.zeros_like(params)
            _, ends = final.update(zeros, ends, params)
            request.params = own.params
            new_updates = request
        else:
            new_updates, ends = final.update(new_updates, ends, params)
            new_updates = optax.tree.cast_like(new_updates, updates)
        return new_updates, (*inner, *cast(Any, outer), *cast(Any, ends))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _request(
    last: Sequence[Elementwise], states: Any, params: PyTree, key: KeyData | None
) -> InPlace:
    """A request to apply updates after the last transformations of a chain."""
    found = [x.scalars(state, params) for x, state in zip(last, states, strict=True)]

    def transform(scalars: Any, update: jax.Array, param: jax.Array) -> jax.Array:
        dtype = update.dtype
        for each, own in zip(last, scalars, strict=True):
            update = each.apply(own, update, param)
        return update.astype(dtype)

    return InPlace(params, transform, list(zip(*found, strict=True)), key=key)
