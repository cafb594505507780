"""Arrays on a mesh: how state is sharded, and what the compiler is told.

Only ``jax.set_mesh`` tells a transformation that there is a mesh: under it the
projections use forms that a sharded side enters as partial sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp

from flora_jax._typing import Axes, AxisNames, PyTree, Shape
from flora_jax._xla import is_sharded

_Type = jax.sharding.AxisType


class MeshAxes(NamedTuple):
    """The number of shards that a name in a sharding stands for.

    Attributes:
      sizes: of the axes of the mesh.
      logical: by logical name, from the rules that map it to axes of the mesh; 0 if the
        sizes of these are not known.
      keep_logical: whether names that are in neither are trusted as well.
    """

    sizes: Mapping[str, int]
    logical: Mapping[str, int] = {}
    keep_logical: bool = False

    def shards(self, name: str) -> int:
        """Number of shards, 0 if unknown; rules take precedence over mesh axes."""
        return self.logical.get(name, self.sizes.get(name, 0))

    def are_mesh_axes(self, names: Iterable[str]) -> bool:
        """Whether all are axes of the mesh; one dimension can have several of these."""
        return all(name in self.sizes and name not in self.logical for name in names)

    def may_divide(self, name: str, size: int, is_rank: bool) -> bool:
        """Whether an axis of this size keeps a name; a rank keeps trusted ones too."""
        if shards := self.shards(name):
            return size % shards == 0
        return is_rank and (name in self.logical or self.keep_logical)


def mesh_axes(
    mesh: Any = None, rules: Iterable[tuple[str, Any]] = (), keep_logical: bool = False
) -> MeshAxes:
    """The axes of a mesh, and the logical names that rules map to them.

    Args:
      mesh: a mesh, abstract or not; None for that of ``jax.set_mesh``.
      rules: pairs of a logical name and what it is mapped to: an axis of the mesh,
        several, or None. If a name has several rules, sizes must be divisible by each.
      keep_logical: as in :class:`MeshAxes`.
    """
    sizes = (jax.sharding.get_abstract_mesh() if mesh is None else mesh).shape
    logical: dict[str, int] = {}
    for name, given in rules:
        axes = _names(given)
        if sizes and not all(axis in sizes for axis in axes):
            continue
        shards = math.prod(sizes.get(axis, 0) for axis in axes)
        logical[name] = math.lcm(logical.get(name, 1), shards)
    return MeshAxes(dict(sizes), logical, keep_logical)


def fit_sharding(
    sharding: Any,
    old: Shape,
    new: Shape,
    axes: MeshAxes | None = None,
    groups: Sequence[Axes] | None = None,
) -> Any:
    """The sharding of an array of state, from that of its parameter: of the same kind.

    An axis of the parameter's size keeps its names. Those of a resized axis (the rank
    of a sketch) stay if they divide its new size. Those of an axis that is reduced to 1
    move to the nearest resized one, on its right or else on its left: of (heads,
    head_dim), folded to one side, to the one that holds the rank.

    Args:
      sharding: the parameter's NamedSharding, PartitionSpec or names of axes, None for
        unsharded ones; axes at the end may be left out.
      old: the parameter's shape.
      new: the shape of an array of its state, of as many axes.
      axes: the mesh's, and logical names; by default those of the sharding, or of
        ``jax.set_mesh``.
      groups: axes that are folded together, where resized axes hold ranks: for these
        logical names of unknown size are trusted, and a rank may equal the size of the
        axis that holds it, which shapes alone do not show. None if unknown.
    """
    named = isinstance(sharding, jax.NamedSharding)
    spec = sharding.spec if named else sharding
    axes = axes or mesh_axes(sharding.mesh if named else None)
    # A PartitionSpec may leave out unsharded axes at its end.
    names = [*spec, *(None for _ in range(len(old) - len(spec)))]
    changed = {i for i in range(len(old)) if old[i] != new[i]}
    folded = (group for group in groups or () if not changed.isdisjoint(group))
    resized = sorted(changed.union(*folded))
    holders = [i for i in resized if new[i] > 1]
    moved: dict[int, list[str]] = {i: [] for i in holders}
    for i in resized:
        if holders:
            holder = min(holders, key=lambda j: (j < i, abs(j - i)))
            moved[holder] += _names(names[i])
        names[i] = None
    for i, given in moved.items():
        names[i] = _dividing(given, new[i], axes, groups is not None)
    if named:
        return jax.NamedSharding(sharding.mesh, jax.P(*names))
    return jax.P(*names) if isinstance(sharding, jax.P) else tuple(names)


def shards_along(
    sharding: Any, along: Axes, axes: MeshAxes | None = None, unknown: int = 1
) -> int:
    """Number of shards of some axes together.

    Args:
      sharding: as in :func:`fit_sharding`.
      along: the axes.
      axes: as in :func:`fit_sharding`.
      unknown: the number for a name that is not known; 0 for none of any with it.
    """
    named = isinstance(sharding, jax.NamedSharding)
    axes = axes or mesh_axes(sharding.mesh if named else None)
    spec = sharding.spec if named else sharding
    names = [name for i, x in enumerate(spec) if i in along for name in _names(x)]
    shards = [axes.shards(name) or unknown for name in names]
    if 0 in shards:
        return 0
    # Of several logical names a side can keep one.
    return math.prod(shards) if axes.are_mesh_axes(names) else max(shards)


def _names(entry: Any) -> tuple[str, ...]:
    """The names in one entry of a PartitionSpec, or of a rule."""
    if isinstance(entry, str):
        return (entry,)
    # None, or PartitionSpec.UNCONSTRAINED.
    return tuple(entry) if isinstance(entry, tuple | list) else ()


def _dividing(
    names: Sequence[str], size: int, axes: MeshAxes, is_rank: bool
) -> str | tuple[str, ...] | None:
    """The names whose shards divide the new size, as an entry of a PartitionSpec."""
    kept: list[str] = []
    if axes.are_mesh_axes(names):
        for name in names:
            shards = math.prod(axes.sizes[x] for x in (*kept, name))
            if size % shards == 0:
                kept.append(name)
    else:
        # Rules map one logical name for each axis of an array, and no tuple of them.
        divide = [x for x in names if axes.may_divide(x, size, is_rank)]
        kept = sorted(divide, key=lambda x: -(axes.shards(x) or 2))[:1]
    return tuple(kept) if len(kept) > 1 else next(iter(kept), None)


def common_shards(size: int) -> int:
    """The least number that every number of shards of an axis of this size divides."""
    products = {1}
    for shards in _axes(jax.sharding.get_abstract_mesh()).values():
        products |= {shards * x for x in products}
    return math.lcm(*(x for x in products if size % x == 0))


def is_manual() -> bool:
    """Whether this is inside of ``jax.shard_map``, over some of a mesh's axes."""
    return _Type.Manual in jax.sharding.get_abstract_mesh().axis_types


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


def on_single_devices(fn: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """``fn(x)`` of a stack of matrices, each of them on one device.

    For work that needs full matrices: it sends a device's share of the stack twice, and
    nothing in between. Matrices of zeros are added, so that each device has as many.

    Args:
      fn: of a stack to one of the same shape; it takes each matrix by itself.
      x: the stack, shape (layers, n, m).
    """
    axes = _axes(jax.sharding.get_abstract_mesh())
    # The minor axis first, of two that shard one side of the matrices.
    names, missing = tuple(axes)[::-1], -x.shape[0] % math.prod(axes.values())
    # One mesh axis after the other: of several at once the compiler would gather.
    new = jnp.pad(x, [(0, missing), (0, 0), (0, 0)])
    for i in range(1, len(names) + 1):
        new = _constrained(new, {0: names[:i]})
    new = _constrained(new, {0: names, 1: None, 2: None})
    new = _constrained(fn(new), {0: names, 1: None, 2: None})
    for i in range(len(names) - 1, 0, -1):
        new = _constrained(new, {0: names[:i]})
    return _constrained(new, {0: None})[: x.shape[0]]


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
