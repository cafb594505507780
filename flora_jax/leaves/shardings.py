"""The one rule by which an array of state is sharded as its parameter is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax

from flora_jax._typing import Shape


def fit_names(
    names: Any, old: Shape, new: Shape, mesh_sizes: Mapping[str, int]
) -> tuple[Any, ...]:
    """Mesh axes of an array of state, from those of its parameter.

    An axis of the parameter's size keeps its mesh axes. One of another size (the rank
    of a sketch, the blocks of a code) keeps them if they divide it, and is unsharded
    otherwise, or where the mesh is not known.

    Args:
      names: mesh axes of the parameter's first axes, None for unsharded ones.
      old: the parameter's shape.
      new: the shape of an array of its state, of as many axes.
      mesh_sizes: size of each mesh axis, empty if not known.

    Returns:
      One name, tuple of names, or None for each axis.
    """
    padded = (*names, *(None for _ in range(len(old) - len(names))))
    return tuple(
        name if a == b or _divides(name, b, mesh_sizes) else None
        for name, a, b in zip(padded, old, new, strict=True)
    )


def _divides(name: Any, size: int, mesh_sizes: Mapping[str, int]) -> bool:
    group = name if isinstance(name, tuple) else (name,)
    axes = [axis for axis in group if axis is not None]
    known = all(axis in mesh_sizes for axis in axes)
    return known and size % math.prod(mesh_sizes[axis] for axis in axes) == 0


def fit_sharding(
    sharding: jax.NamedSharding, old: Shape, new: Shape
) -> jax.NamedSharding:
    """The sharding of an array of state, from that of its parameter."""
    names = fit_names(sharding.spec, old, new, sharding.mesh.shape)
    return jax.NamedSharding(sharding.mesh, jax.P(*names))
