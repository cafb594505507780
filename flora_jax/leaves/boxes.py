"""Boxes around arrays: NNX Variables, Linen boxes, and the shardings that they name.

They are known by what they offer; flax is not imported.
"""

from __future__ import annotations

import dataclasses
import functools
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
_SHARDINGS = ("out_sharding", "optimizer_sharding", "sharding", "sharding_names")


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["names"]
)
@dataclasses.dataclass(frozen=True)
class Placed:
    """A box around an array that has none: its sharding, as a Linen box names axes.

    Attributes:
      value: the array.
      names: its NamedSharding or PartitionSpec.
    """

    value: Any
    names: Any

    def replace(self, **changes: Any) -> Placed:
        """The box with other contents."""
        return dataclasses.replace(self, **changes)

    replace_boxed = replace


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

    They are those with such a name in a box's metadata, and the one that MaxText's
    variables give as ``param_scan_axis`` where they have a ``partition_name``. An axis
    of the mesh may have such a name too, and shard anything.
    """
    if not is_box(node):
        return (), ()
    given = node.get_metadata() if _is_variable(node) else {}
    mesh = box_axes(node, False).sizes
    names = {
        (i, name)
        for place in named_shardings(node).values()
        for i, name in enumerate(getattr(place, "spec", place))
        if isinstance(name, str) and name not in mesh
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
    """What a box says of its array's sharding, by the name of the metadata."""
    if not _is_variable(box):
        return {"names": box.names}
    given = box.get_metadata()
    return {k: given[k] for k in _SHARDINGS if given.get(k) is not None}


def rebox(box: Any, plan: LeafPlan | None, value: jax.Array) -> Any:
    """The same kind of box around an array of state, with shardings that fit it.

    Args:
      box: the parameter's.
      plan: the parameter's; None where no axes are folded.
      value: the array.
    """
    (leaf,) = jax.tree.leaves(box)
    axes = box_axes(box, plan is not None and plan.keep_logical_axes)
    groups = plan.groups if plan else ()
    fitted = {
        name: fit_sharding(place, leaf.shape, value.shape, groups, axes)
        for name, place in named_shardings(box).items()
    }
    return with_metadata(box, value, **fitted)


def with_metadata(box: Any, value: Any, **metadata: Any) -> Any:
    """The same kind of box around another value, with other metadata."""
    if _is_variable(box):
        return box.copy(value, **metadata)
    return box.replace(value=value, **metadata)


def place(node: Any, sharding: Any) -> Any:
    """A parameter in a box that says its sharding, whatever it said before."""
    if not is_box(node):
        return Placed(node, sharding)
    (leaf,) = jax.tree.leaves(node)
    names = named_shardings(node) or ["out_sharding"]
    return with_metadata(node, leaf, **dict.fromkeys(names, sharding))


def box_axes(box: Any, keep_logical: bool) -> MeshAxes:
    """The mesh that a box's names refer to, and the rules that map them to it.

    The mesh is that of the box's sharding or of its array, that of its metadata, or
    that of ``jax.set_mesh``; the rules are the metadata's own and flax's active ones.

    Args:
      box: the box.
      keep_logical: whether names that no rule maps are relied on.
    """
    (leaf,) = jax.tree.leaves(box)
    given = box.get_metadata() if _is_variable(box) else vars(box)
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
    for place, axes in _places(node):
        return shards_along(place, along, axes)
    return 1


def side_shards(node: Any, plan: LeafPlan) -> tuple[int, int]:
    """Number of shards of the sketched side: a leaf's, and its sketch's.

    Args:
      node: the leaf, or the box around it.
      plan: its plan.
    """
    side, old, new = plan.sketched_axes, plan.shape, plan.state_shape
    for place, axes in _places(node, plan.keep_logical_axes):
        fitted = fit_sharding(place, old, new, plan.groups, axes)
        return shards_along(place, side, axes), shards_along(fitted, side, axes)
    return 1, 1


def _places(node: Any, keep_logical: bool = False) -> Iterator[tuple[Any, Any]]:
    """What a box or an array says of its sharding, and the axes that it refers to."""
    if is_box(node):
        axes = box_axes(node, keep_logical)
        yield from ((place, axes) for place in named_shardings(node).values())
    elif (place := array_sharding(node)) is not None:
        yield place, None
