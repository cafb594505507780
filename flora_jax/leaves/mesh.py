"""What the compiler is told where arrays are sharded over a mesh.

Only ``jax.set_mesh`` tells a transformation that there is a mesh: under it the
projections use forms that a sharded side enters as partial sums.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.core

from flora_jax._typing import AxisNames, PyTree

_Type = jax.sharding.AxisType


def is_sharded() -> bool:
    """Whether the compiler may shard arrays here, over the axes of a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and math.prod(_axes(mesh).values()) > 1


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
    spec: list[Any] = [jax.P.UNCONSTRAINED] * x.ndim
    for axis, names in axes.items():
        spec[axis] = names
    return jax.lax.with_sharding_constraint(x, jax.P(*spec))


def varying(tree: PyTree, axis_name: AxisNames | None) -> PyTree:
    """The arrays as ones that differ over axes of ``jax.shard_map``; others pass."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    mesh = jax.sharding.get_abstract_mesh()
    manual = tuple(name for name in names if name in _axes(mesh, _Type.Manual))
    return jax.lax.pcast(tree, manual, to="varying") if manual else tree


def _axes(
    mesh: jax.sharding.AbstractMesh, wanted: jax.sharding.AxisType = _Type.Auto
) -> dict[str, int]:
    """Mesh axes of a type, and their sizes; the compiler shards over Auto ones."""
    if mesh.empty:
        return {}
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in axes if kind is wanted}
