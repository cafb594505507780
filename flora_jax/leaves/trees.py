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
import optax

from flora_jax.leaves.plan import LeafPlan
from flora_jax.leaves.rules import named_leaves

Shape = tuple[int, ...]


def zeros_tree(params: Any, shapes: Sequence[Shape], dtype: Any) -> Any:
    """Builds a tree of zeros with the structure of the parameters.

    NNX Variables and Linen boxes are kept around the arrays, without the sharding
    metadata of each axis whose size differs from the parameter's.

    Args:
      params: parameters, ShapeDtypeStructs of them, boxed or not.
      shapes: one shape per leaf, in flattening order.
      dtype: dtype of the arrays.

    Returns:
      The tree.
    """
    boxes, treedef = jax.tree.flatten(params, is_leaf=is_box)
    zeros = []
    for box, shape in zip(boxes, shapes, strict=True):
        (leaf,) = jax.tree.leaves(box)
        new = _zeros(leaf, shape, dtype)
        zeros.append(_rebox(box, jnp.shape(leaf), new) if is_box(box) else new)
    return jax.tree.unflatten(treedef, zeros)


def _zeros(leaf: Any, shape: Shape, dtype: Any) -> jax.Array:
    """Zeros, sharded as the leaf is on every axis that has the leaf's size."""
    concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
    if concrete and isinstance(leaf.sharding, jax.NamedSharding):
        return jnp.zeros(shape, dtype, device=_fit(leaf.sharding, leaf, shape))
    sharding = jax.typeof(leaf).sharding
    if _explicit_axes(sharding.mesh):
        return jnp.zeros(shape, dtype, out_sharding=_fit(sharding, leaf, shape))
    return jnp.zeros(shape, dtype)


def _fit(sharding: jax.NamedSharding, leaf: Any, shape: Shape) -> jax.NamedSharding:
    return jax.NamedSharding(
        sharding.mesh, jax.P(*fit_names(sharding.spec, leaf.shape, shape))
    )


def fit_names(
    names: Any, old: Shape, new: Shape, fits: Callable[[Any, int], bool] | None = None
) -> tuple[Any, ...]:
    """Axis names, with None for each axis that may not keep its own.

    Args:
      names: of the parameter's first axes; the others have none.
      old: the parameter's shape.
      new: the shape of an array of its state.
      fits: of a name and a size that is not the parameter's, whether they go together;
        by default none do.

    Returns:
      One name for each axis.
    """
    padded = (*names, *(None for _ in range(len(old) - len(names))))
    return tuple(
        name if a == b or (fits is not None and fits(name, b)) else None
        for name, a, b in zip(padded, old, new, strict=True)
    )


def _is_variable(x: Any) -> bool:
    return hasattr(x, "get_metadata") and hasattr(x, "get_value")


def is_masked(x: Any) -> bool:
    """Whether x stands for a leaf that ``optax.masked`` leaves to others."""
    return isinstance(x, optax.MaskedNode)


def is_box(x: Any) -> bool:
    """Whether x is an NNX Variable or a Linen box; by their methods, without flax."""
    boxed = _is_variable(x) or (hasattr(x, "replace_boxed") and hasattr(x, "names"))
    # A box that optax.masked has emptied is left to jax as any other node.
    return boxed and len(jax.tree.leaves(x)) == 1


def _rebox(box: Any, old: Shape, value: jax.Array) -> Any:
    """The same kind of box around another value, with sharding metadata that fits."""
    if not _is_variable(box):
        return box.replace(value=value, names=fit_names(box.names, old, value.shape))
    metadata = {}
    for name in ("out_sharding", "optimizer_sharding"):
        given = box.get_metadata().get(name)
        if isinstance(given, jax.NamedSharding):
            names = fit_names(given.spec, old, value.shape)
            metadata[name] = jax.NamedSharding(given.mesh, jax.P(*names))
        elif given is not None:
            metadata[name] = fit_names(given, old, value.shape)
    return box.copy(value, **metadata)


def matching_leaves(
    name: str, field: str, tree: Any, plans: Sequence[LeafPlan], shapes: Sequence[Shape]
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
    found = list(named_leaves(tree))
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


def cast_like(new: Any, old: jax.Array) -> jax.Array:
    """The new state in the dtype of the old, so that the state stays as it was."""
    return jax.lax.convert_element_type(new, old.dtype)


def rebuild(tree: Any, leaves: Sequence[Any]) -> Any:
    """The leaves in the structure of ``tree``."""
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def run_sharded(fn: Callable[..., Any], like: Any, *args: Any) -> Any:
    """Runs ``fn(*args)`` where reshapes and gathers may cross shards.

    On a mesh with Explicit axes such operations ask for an output sharding each; here
    the compiler chooses inside, and only the results are pinned. Elsewhere this is a
    plain call.

    Args:
      fn: a function of arrays; it closes over no array.
      like: a tree of the structure of fn's result, of arrays whose sharding to take.
      *args: the arrays; also python numbers.

    Returns:
      ``fn(*args)``.
    """
    found = (jax.typeof(x).sharding for x in jax.tree.leaves((like, args)))
    # Of the arrays: the mesh of the context is empty where none was set.
    meshes = [x.mesh for x in found if _explicit_axes(x.mesh)]
    if not meshes:
        return fn(*args)

    def sharding(x: Any) -> jax.NamedSharding:
        given = jax.typeof(x).sharding
        # A number made without the mesh, such as a counter, is on all of it.
        return given if given.mesh.axis_names else jax.NamedSharding(meshes[0], jax.P())

    shardings = jax.tree.map(sharding, like)
    return jax.sharding.auto_axes(fn, out_sharding=shardings)(*args)


def _explicit_axes(mesh: Any) -> bool:
    return jax.sharding.AxisType.Explicit in mesh.axis_types
