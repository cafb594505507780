"""Boxes around arrays: NNX Variables, Linen boxes, and the shardings that they name.

Boxes are recognized by their attributes; flax is not imported.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.core

from flora_jax._typing import Axes, PyTree
from flora_jax.leaves.mesh import (
    MeshAxes,
    fit_sharding,
    is_explicit,
    mesh_axes,
    shards_along,
)
from flora_jax.leaves.paths import is_masked, normalize_path
from flora_jax.leaves.plan import LeafPlan

# Logical names of axes along which layers or experts are stacked, in flax's examples
# and MaxText; nn.scan and nnx.vmap insert the one given to them as partition name.
_STACKED = re.compile(r"(\w+_)?layers?|stack|stage|circular_repeats|exp|experts?")
_HEADS = re.compile(r"(\w+_)?heads")

# Metadata of a Variable that name an axis of the mesh, or a logical one that rules map
# to the mesh, for each axis of its array: flax's own, and what trainers add.
# ``optimizer_sharding`` is the one that flax gives to the state of an optimizer.
_SHARDINGS = ("optimizer_sharding", "out_sharding", "sharding", "sharding_names")


def _is_variable(x: Any) -> bool:
    return hasattr(x, "get_metadata") and hasattr(x, "get_value")


def _is_boxed(x: Any) -> bool:
    return _is_variable(x) or (hasattr(x, "replace_boxed") and hasattr(x, "names"))


def is_box(x: Any) -> bool:
    """Whether x is an NNX Variable or a Linen box around one array."""
    # A box that optax.masked has emptied is left to jax as any other node.
    return _is_boxed(x) and len(jax.tree.leaves(x)) == 1


def unboxed(tree: PyTree) -> PyTree:
    """The tree with what boxes hold in their place: an array, or a MaskedNode."""

    def content(box: Any) -> list[Any]:
        return jax.tree.leaves(box, is_leaf=is_masked)

    def is_full(x: Any) -> bool:
        return _is_boxed(x) and len(content(x)) == 1

    return jax.tree.map(
        lambda x: content(x)[0] if is_full(x) else x, tree, is_leaf=is_full
    )


def named_nodes(tree: PyTree) -> list[tuple[str, Any]]:
    """Normalized path of each leaf, and the leaf or the box around it."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_box)
    return [(normalize_path(path), node) for path, node in flat]


def axis_roles(node: Any) -> tuple[Axes, Axes]:
    """Axes along which layers or experts are stacked, and axes of attention heads.

    Both are read from the names in a box's metadata; a stacked axis also from MaxText's
    ``partition_name`` and ``param_scan_axis``. Names of mesh axes are ignored.
    """
    if not is_box(node):
        return (), ()
    given, axes = _metadata(node), box_axes(node, False)
    names = {
        (i, name)
        for sharding in named_shardings(node).values()
        for i, name in enumerate(getattr(sharding, "spec", sharding))
        if isinstance(name, str) and not axes.are_mesh_axes([name])
    }
    partition = given.get("partition_name")
    stacked = {i for i, x in names if x == partition or _STACKED.fullmatch(x)}
    if not stacked and partition is not None and "param_scan_axis" in given:
        stacked = {given["param_scan_axis"]}
    heads = {i for i, x in names if _HEADS.fullmatch(x)}
    return tuple(sorted(stacked)), tuple(sorted(heads))


def array_sharding(x: Any) -> jax.NamedSharding | None:
    """The sharding of an array where it is known: concrete, or part of its type."""
    concrete = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
    if concrete or isinstance(x, jax.ShapeDtypeStruct):
        return x.sharding if isinstance(x.sharding, jax.NamedSharding) else None
    sharding = jax.typeof(x).sharding
    return sharding if is_explicit(sharding) else None


def named_shardings(box: Any) -> dict[str, Any]:
    """The shardings in a box's metadata, by the name of the metadata.

    Those that name no axes, such as a SingleDeviceSharding, are left out.
    """
    given = _metadata(box)
    names = _SHARDINGS if _is_variable(box) else ("names",)
    kinds = tuple | list | jax.P | jax.NamedSharding
    return {k: given[k] for k in names if isinstance(given.get(k), kinds)}


def _metadata(box: Any) -> dict[str, Any]:
    return box.get_metadata() if _is_variable(box) else vars(box)


def rebox(box: Any, plan: LeafPlan | None, value: jax.Array) -> Any:
    """The same kind of box around an array of state, with shardings that fit it.

    Args:
      box: the parameter's.
      plan: the parameter's; None where no resized axis holds a rank.
      value: the array.
    """
    (leaf,) = jax.tree.leaves(box)
    axes = box_axes(box, plan is not None and plan.keep_logical_axes)
    groups = None if plan is None else plan.groups
    fitted = {
        name: fit_sharding(sharding, leaf.shape, value.shape, axes, groups)
        for name, sharding in named_shardings(box).items()
    }
    if _is_variable(box):
        return box.copy(value, **fitted)
    return box.replace(value=value, **fitted)


def box_axes(box: Any, keep_logical: bool) -> MeshAxes:
    """The mesh that a box's names refer to, and the rules that map them to it.

    The mesh is that of the box's sharding or of its array, that of its metadata, or
    that of ``jax.set_mesh``; the rules are the metadata's own and flax's active ones.

    Args:
      box: the box.
      keep_logical: whether names that no rule maps are trusted.
    """
    (leaf,) = jax.tree.leaves(box)
    given = _metadata(box)
    known = [*named_shardings(box).values(), array_sharding(leaf)]
    meshes = [x.mesh for x in known if isinstance(x, jax.NamedSharding)]
    mesh = next(iter(meshes), given.get("mesh"))
    return mesh_axes(mesh, _rules(given), keep_logical)


def _rules(metadata: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from metadata.get("sharding_rules") or metadata.get("rules") or ()
    # Rules are active only where flax has been imported.
    active = sys.modules.get("flax.core.spmd")
    if active is not None:
        yield from active.get_logical_axis_rules()


def axis_shards(node: Any, along: Axes) -> int:
    """Number of shards of some axes of a leaf, or of the leaf in a box."""
    sharding, axes = _known_sharding(node, False)
    return 1 if sharding is None else shards_along(sharding, along, axes)


def known_shards(node: Any, axis: int) -> int:
    """Number of shards of an axis of a leaf, or of the leaf in a box; 0 if unknown."""
    sharding, axes = _known_sharding(node, False)
    return 0 if sharding is None else shards_along(sharding, (axis,), axes, 0)


def side_shards(node: Any, plan: LeafPlan, sharding: Any = None) -> tuple[int, int]:
    """Number of shards of the sketched side: a leaf's, and its sketch's.

    Args:
      node: the leaf, or the box around it.
      plan: its plan.
      sharding: the leaf's; None to take it from the node.
    """
    axes = None
    if sharding is None:
        sharding, axes = _known_sharding(node, plan.keep_logical_axes)
    if sharding is None:
        return 1, 1
    fitted = fit_sharding(sharding, plan.shape, plan.state_shape, axes, plan.groups)
    side = plan.sketched_axes
    return shards_along(sharding, side, axes), shards_along(fitted, side, axes)


def _known_sharding(node: Any, keep_logical: bool) -> tuple[Any, MeshAxes | None]:
    """The sharding of a leaf as far as it is known, and the axes that it refers to."""
    if not is_box(node):
        return array_sharding(node), None
    (leaf,) = jax.tree.leaves(node)
    sharding = next(iter(named_shardings(node).values()), array_sharding(leaf))
    return sharding, box_axes(node, keep_logical)
