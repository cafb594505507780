"""Arrays on a mesh: how state is sharded, and what the compiler is told.

Only ``jax.set_mesh`` tells a transformation that there is a mesh: under it the
projections use forms that a sharded side enters as partial sums.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.core

from flora_jax._typing import AxisNames, PyTree, Shape

_Type = jax.sharding.AxisType


def fit_sharding(place: Any, old: Shape, new: Shape, mesh: Any = None) -> Any:
    """The sharding of an array of state, from that of its parameter: of the same kind.

    An axis of the parameter's size keeps its mesh axes. One of another size (the rank
    of a sketch, the blocks of a code) keeps them if they divide it, and is unsharded
    otherwise, or where the mesh is not known.

    Args:
      place: the parameter's NamedSharding, PartitionSpec or names of mesh axes, None
        for unsharded ones; axes at the end may be left out.
      old: the parameter's shape.
      new: the shape of an array of its state, of as many axes.
      mesh: what gives the sizes of mesh axes; by default the sharding's, or that of
        ``jax.set_mesh``.
    """
    named = isinstance(place, jax.NamedSharding)
    spec = place.spec if named else place
    mesh = mesh or (place.mesh if named else jax.sharding.get_abstract_mesh())
    # A PartitionSpec may leave out unsharded axes at its end.
    padded = (*spec, *(None for _ in range(len(old) - len(spec))))
    names = tuple(
        name if a == b or _divides(name, b, mesh.shape) else None
        for name, a, b in zip(padded, old, new, strict=True)
    )
    if named:
        return jax.NamedSharding(place.mesh, jax.P(*names))
    return jax.P(*names) if isinstance(place, jax.P) else names


def _divides(name: Any, size: int, mesh_sizes: Mapping[str, int]) -> bool:
    group = name if isinstance(name, tuple) else (name,)
    axes = [axis for axis in group if axis is not None]
    known = all(axis in mesh_sizes for axis in axes)
    return known and size % math.prod(mesh_sizes[axis] for axis in axes) == 0


def is_sharded() -> bool:
    """Whether the compiler may shard arrays here, over the axes of a mesh."""
    # Manual axes do not count: inside of shard_map each device has its own array.
    return math.prod(_axes(jax.sharding.get_abstract_mesh()).values()) > 1


def is_explicit(*shardings: Any) -> bool:
    """Whether one of them is part of the type, and not the compiler's to choose."""
    meshes = {x.mesh for x in shardings if x is not None}
    return any(_Type.Explicit in mesh.axis_types for mesh in meshes)


def replicated_along(x: jax.Array, axis: int) -> jax.Array:
    """The array with one axis unsharded, the others as they come.

    Left alone, the compiler may rather gather a gradient than sum up its sketches.
    """
    return _constrained(x, {axis: None})


def replicated(x: jax.Array) -> jax.Array:
    """The array on each device: leaves with different shardings share it."""
    return _constrained(x, dict.fromkeys(range(x.ndim)))


def sharded_along(x: jax.Array, axis: int, unsharded: int) -> jax.Array:
    """The array sharded along one axis over all devices, and unsharded along another.

    For work that needs one side in full: each device does its share of the other. An
    axis that the devices cannot share evenly is left as it comes.
    """
    names = _axes(jax.sharding.get_abstract_mesh())
    if x.shape[axis] % math.prod(names.values()):
        return x
    return _constrained(x, {axis: tuple(names), unsharded: None})


def _constrained(x: jax.Array, axes: dict[int, Any]) -> jax.Array:
    # A concrete array stays where it is.
    if not isinstance(x, jax.core.Tracer) or not is_sharded():
        return x
    # An axis with None would be replicated; these are left to the compiler.
    spec: list[Any] = [jax.P.UNCONSTRAINED] * x.ndim
    for axis, names in axes.items():
        spec[axis] = names
    return jax.lax.with_sharding_constraint(x, jax.P(*spec))


def varying(tree: PyTree, axis_name: AxisNames | None) -> PyTree:
    """The arrays as ones that differ over axes of ``jax.shard_map``; others pass."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    mesh = jax.sharding.get_abstract_mesh()
    # jax.vmap has axis names too, without a mesh and without varying types.
    manual = tuple(name for name in names if name in _axes(mesh, _Type.Manual))
    return jax.lax.pcast(tree, manual, to="varying") if manual else tree


def _axes(
    mesh: jax.sharding.AbstractMesh, wanted: jax.sharding.AxisType = _Type.Auto
) -> dict[str, int]:
    """Mesh axes of a type, and their sizes; the compiler shards over Auto ones."""
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in axes if kind is wanted}
