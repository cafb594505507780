"""Parameter-shaped trees of state: built, looked up, and run under any sharding.

The rules that let a state survive what is done to it: exactly one array per parameter
leaf, with the parameter's number of axes, in a tree of the parameters' structure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from flora_jax._typing import PyTree, Shape
from flora_jax.leaves import boxes
from flora_jax.leaves.boxes import is_box
from flora_jax.leaves.mesh import fit_sharding, is_explicit
from flora_jax.leaves.paths import named_leaves
from flora_jax.leaves.plan import LeafPlan


def zeros_tree(
    params: PyTree,
    plans: Sequence[LeafPlan] | None,
    shapes: Sequence[Shape],
    dtype: Any,
) -> PyTree:
    """Builds a tree of zeros with the structure of the parameters.

    NNX Variables and Linen boxes are kept around the arrays, with the sharding metadata
    that fits them.

    Args:
      params: parameters, ShapeDtypeStructs of them, boxed or not.
      plans: their plans, in flattening order; None where no resized axis holds a rank.
      shapes: one shape per leaf, in flattening order.
      dtype: dtype of the arrays.

    Returns:
      The tree.
    """
    nodes, treedef = jax.tree.flatten(params, is_leaf=is_box)
    known = [None] * len(nodes) if plans is None else plans
    zeros = []
    for node, plan, shape in zip(nodes, known, shapes, strict=True):
        (leaf,) = jax.tree.leaves(node)
        new = _zeros(leaf, plan, shape, dtype)
        zeros.append(boxes.rebox(node, plan, new) if is_box(node) else new)
    return jax.tree.unflatten(treedef, zeros)


def zero_sketches(params: PyTree, plans: Sequence[LeafPlan], dtype: Any) -> PyTree:
    """:func:`zeros_tree` of the sketches of all leaves, and of the dense leaves."""
    return zeros_tree(params, plans, [plan.state_shape for plan in plans], dtype)


def only_leaves(tree: PyTree, kept: Sequence[bool]) -> PyTree:
    """The tree with a single zero, of as many axes, in place of the leaves not kept."""
    nodes, treedef = jax.tree.flatten(tree, is_leaf=is_box)
    leaves = [
        node if keep else _one_zero(node)
        for node, keep in zip(nodes, kept, strict=True)
    ]
    return jax.tree.unflatten(treedef, leaves)


def _one_zero(node: Any) -> Any:
    (leaf,) = jax.tree.leaves(node)
    shape = (1,) * jnp.ndim(leaf)
    return zeros_tree(node, None, [shape], jnp.result_type(leaf))


def _zeros(leaf: Any, plan: LeafPlan | None, shape: Shape, dtype: Any) -> jax.Array:
    """Zeros, sharded as the leaf is."""
    sharding = boxes.array_sharding(leaf)
    if sharding is None:
        return jnp.zeros(shape, dtype)
    groups = None if plan is None else plan.groups
    sharding = fit_sharding(sharding, leaf.shape, shape, groups=groups)
    if is_explicit(sharding) and isinstance(leaf, jax.core.Tracer):
        return jnp.zeros(shape, dtype, out_sharding=sharding)
    # A ShapeDtypeStruct may lie on an abstract mesh, which has no devices.
    concrete = isinstance(sharding.mesh, jax.sharding.Mesh)
    return jnp.zeros(shape, dtype, device=sharding if concrete else None)


def matching_leaves(
    name: str,
    field: str,
    tree: PyTree,
    plans: Sequence[LeafPlan],
    shapes: Sequence[Shape],
) -> list[jax.Array]:
    """Leaves of a state tree, after checking them against the gradients' plans.

    Args:
      name: the transformation whose state it is.
      field: the state's field.
      tree: the tree in that field.
      plans: plans of the gradient leaves, in flattening order.
      shapes: shape expected of each leaf of ``tree``.

    Returns:
      The arrays, in flattening order.

    Raises:
      ValueError: naming the first leaf that is missing, extra or of another shape.
    """
    found = named_leaves(tree)
    known = {path for path, _ in found}
    for plan in plans:
        if plan.path not in known:
            raise ValueError(
                f"`updates` has leaf {plan.path!r} of shape {plan.shape}, but"
                f" `state.{field}` of {name} has none; pass the gradients of the"
                " parameters that init saw, or init again"
            )
    wanted = {plan.path for plan in plans}
    for path, leaf in found:
        if path not in wanted:
            raise ValueError(
                f"`state.{field}` of {name} has leaf {path!r} of shape {leaf.shape},"
                " but `updates` has none; pass a gradient for every parameter that"
                " init saw, or leave parameters out with optax.masked"
            )
    for plan, shape, (path, leaf) in zip(plans, shapes, found, strict=True):
        if path != plan.path or leaf.shape != shape:
            raise ValueError(
                f"leaf {plan.path!r} of `updates` has shape {plan.shape} and wants"
                f" state of shape {shape}, but `state.{field}` of {name} holds"
                f" {path!r} of shape {leaf.shape}; the state was made for other"
                " parameters, ranks or rules: init again, or restore the settings"
            )
    return [leaf for _, leaf in found]


def cast_like(new: jax.Array, old: jax.Array) -> jax.Array:
    """The new state in the dtype of the old, so that the state stays as it was."""
    return jax.lax.convert_element_type(new, old.dtype)


def rebuild(tree: PyTree, leaves: Sequence[Any]) -> PyTree:
    """The leaves in the structure of ``tree``."""
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def run_sharded(fn: Callable[..., Any], like: PyTree, *args: Any) -> PyTree:
    """Runs ``fn(*args)`` where reshapes and gathers may cross shards.

    On a mesh with Explicit axes such operations ask for an output sharding each; here
    the compiler chooses inside, and only the results are pinned. Elsewhere this is a
    plain call.

    Args:
      fn: a function of arrays; it closes over no array.
      like: arrays whose shardings the results take; a prefix of the result's tree,
        where a replicated array may stand for a subtree.
      *args: the arrays, or Python scalars.

    Returns:
      ``fn(*args)``.
    """
    found = [jax.typeof(x).sharding for x in jax.tree.leaves((like, args))]
    if not is_explicit(*found):
        return fn(*args)
    # Of the arrays: the mesh of the context is empty where none was set.
    mesh = next(x.mesh for x in found if is_explicit(x))

    def sharding(x: Any) -> jax.NamedSharding:
        given = jax.typeof(x).sharding
        # P() and not P(None, …): one array, such as the key, may stand for results with
        # other numbers of axes. Counters were made without the mesh.
        replicated = not given.mesh.axis_names or not any(given.spec)
        return jax.NamedSharding(mesh, jax.P()) if replicated else given

    shardings = jax.tree.map(sharding, like)
    return jax.sharding.auto_axes(fn, out_sharding=shardings)(*args)
