"""What the compiler is told where arrays are cut over a mesh.

Only ``jax.set_mesh`` tells a transformation that there is a mesh: under it the
projections use forms that a cut side goes into as partial sums.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.core

_Type = jax.sharding.AxisType


def cuts_arrays() -> bool:
    """Whether the compiler may cut arrays here, over the axes of a mesh."""
    return math.prod(_axes().values()) > 1


def whole_along(x: jax.Array, axis: int) -> jax.Array:
    """The array with one axis whole on each device, the others as they come.

    Left alone, the compiler may rather gather a gradient than sum up its sketches.
    """
    return _constrained(x, {axis: None}) if cuts_arrays() else x


def whole(x: jax.Array) -> jax.Array:
    """The array whole on each device: leaves that are cut differently share it."""
    return _constrained(x, dict.fromkeys(range(x.ndim))) if cuts_arrays() else x


def spread_over(x: jax.Array, axis: int, uncut: int) -> jax.Array:
    """The array cut along one axis over all devices, and whole along another one.

    For work that needs one side whole: each device does its share of the other. An axis
    that the devices cannot share evenly is left as it comes.
    """
    names = _axes()
    devices = math.prod(names.values())
    if x.shape[axis] % devices or not cuts_arrays():
        return x
    return _constrained(x, {axis: tuple(names), uncut: None})


def _constrained(x: jax.Array, axes: dict[int, Any]) -> jax.Array:
    if not isinstance(x, jax.core.Tracer):  # Lies where it lies.
        return x
    spec: list[Any] = [jax.P.UNCONSTRAINED] * x.ndim
    for axis, names in axes.items():
        spec[axis] = names
    return jax.lax.with_sharding_constraint(x, jax.P(*spec))


def varying(tree: Any, axis_name: str | tuple[str, ...] | None) -> Any:
    """The arrays as ones that differ over axes of ``jax.shard_map``; others pass."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    manual = tuple(name for name in names if name in _axes(_Type.Manual))
    return jax.lax.pcast(tree, manual, to="varying") if manual else tree


def _axes(wanted: jax.sharding.AxisType = _Type.Auto) -> dict[str, int]:
    """Mesh axes of a type, and their sizes; Auto ones are the compiler's to cut."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in axes if kind is wanted}
