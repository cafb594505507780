"""Transformations that treat each leaf by itself, and chains of them that fuse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import jax
import optax

from flora_jax._typing import PyTree
from flora_jax.leaves.trees import rebuild, run_sharded
from flora_jax.sketching.sketcher import OnSketch, ScaledLeaf, gradient_shapes


class Part(NamedTuple):
    """A transformation without the trees around it.

    Attributes:
      init: from parameters to a state.
      plan: from updates and state to static decisions, after all checks.
      step: from those, the ScaledLeafs, a state, ``on_sketch`` and ``settings`` to new
        ones; it closes over no array.
      settings: hyperparameters that may be traced.
    """

    init: optax.TransformInitFn
    plan: Callable[[PyTree, Any], Any]
    step: Callable[..., tuple[list[ScaledLeaf], Any]]
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
) -> tuple[PyTree, tuple[Any, ...]]:
    """Runs parts in their order, without arrays in between.

    Equal to chaining them in float32; a chain rounds narrower gradients after each.

    Args:
      parts: applied in this order.
      updates: the gradients; SketchedGradients if the first part takes them.
      states: one per part.
      on_sketch: told of each sketch that is made; see ``SketchEvent``.

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
        for part, plan, state, scalars in zip(parts, plans, old, settings, strict=True):
            leaves, state = part.step(plan, leaves, state, on_sketch, *scalars)
            new.append(state)
        values = [
            leaf.value().astype(each.dtype)
            for leaf, each in zip(leaves, like, strict=True)
        ]
        return values, jax.tree.leaves(new)

    settings = [part.settings for part in parts]
    values, arrays = run_sharded(run, (like, arrays), grads, arrays, settings)
    return rebuild(updates, values), jax.tree.unflatten(treedef, arrays)


def chain_parts(
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
      TypeError: from update, if ``state`` is not what init returned.
      ValueError: from update, if ``params`` are needed and missing.
    """
    rest = optax.with_extra_args_support(optax.chain(*transformations))

    def init_fn(params: PyTree) -> tuple[Any, ...]:
        states = [part.init(params) for part in parts]
        return (*states, *cast(Any, rest.init(params)))

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
        inner, outer = state[: len(parts)], state[len(parts) :]
        new_updates = updates
        if parts:
            on_sketch = extra_args.get("on_sketch")
            new_updates, inner = run_parts(parts, updates, inner, on_sketch)
        new_updates, outer = rest.update(new_updates, outer, params, **extra_args)
        states = (*inner, *cast(Any, outer))
        return optax.tree.cast_like(new_updates, updates), states

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
