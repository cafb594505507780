"""Shardings of a whole optimizer state, from those of the parameters."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax

from flora_jax.leaves.rules import named_leaves
from flora_jax.leaves.trees import fit_names, is_box, is_masked


def state_sharding(
    tx: optax.GradientTransformation, params: Any, shardings: Any
) -> Any:
    """Says how a state is laid out on the mesh that the parameters are laid out on.

    Each array of a parameter-shaped tree keeps the parameter's mesh axes on every axis
    that has the parameter's size. An axis of another size (the rank of a sketch, the
    blocks of a code) keeps them if they divide it, and is whole on each device
    otherwise. Everything else, counters and keys, is replicated.

    Nothing is allocated. Give the result to ``jax.jit`` as ``out_shardings`` of
    ``tx.init`` and of the training step, and run both under ``jax.set_mesh``: there the
    projections know of the mesh, and sketch a side that is cut as a sum over devices;
    elsewhere the compiler may gather gradients. An exact singular value decomposition
    gathers them in any case; ``TopSVD(method="randomized")`` does not.

    Args:
      tx: any transformation, in any chain or wrapper.
      params: the parameters, or ShapeDtypeStructs of them; NNX States and Linen boxes
        as well.
      shardings: one ``NamedSharding`` or ``PartitionSpec`` per parameter, in a tree of
        the structure of ``params``. With PartitionSpecs the sizes of the mesh are those
        of ``jax.set_mesh``.

    Returns:
      A tree of the structure of ``tx.init(params)``, of shardings of the same kind.

    Raises:
      TypeError: for a leaf of ``shardings`` that is neither.
      ValueError: if ``shardings`` has not the structure of ``params``, or lives on
        several meshes.
    """
    given = dict(named_leaves(shardings))
    leaves = dict(named_leaves(params))
    if given.keys() != leaves.keys():
        missing = sorted(leaves.keys() ^ given.keys())
        raise ValueError(
            "`shardings` must have one entry for each parameter, got trees that differ"
            f" at {missing}; map the parameters to their shardings with jax.tree.map"
        )
    mesh = _mesh(given)
    # Boxes carry metadata that their copies in a state do not share.
    plain = jax.tree.map(_unboxed, params, is_leaf=is_box)
    ordered = jax.tree.unflatten(
        jax.tree.structure(plain), [given[path] for path in leaves]
    )

    def divides(names: Any, size: int) -> bool:
        return size % _devices(names, mesh) == 0

    def fit(leaf: Any, sharding: Any, param: Any) -> Any:
        if is_masked(leaf):  # Its parameter is another transformation's.
            return leaf
        if leaf.ndim != param.ndim:  # Not of this package: optax's factored moments.
            return _like(sharding, jax.P())
        spec = sharding.spec if isinstance(sharding, jax.NamedSharding) else sharding
        names = fit_names(spec, param.shape, leaf.shape, divides)
        return _like(sharding, jax.P(*names))

    first = next(iter(given.values()), jax.P())
    found = optax.tree.map_params(
        tx,
        fit,
        jax.eval_shape(tx.init, plain),
        ordered,
        plain,
        transform_non_params=lambda leaf: _like(first, jax.P()),
        is_leaf=is_masked,
    )
    boxed = jax.tree.structure(jax.eval_shape(tx.init, params))
    return jax.tree.unflatten(boxed, jax.tree.leaves(found))


def _mesh(shardings: dict[str, Any]) -> Any:
    meshes = []
    for path, sharding in shardings.items():
        if isinstance(sharding, jax.NamedSharding):
            meshes.append(sharding.mesh)
        elif not isinstance(sharding, jax.P):
            raise TypeError(
                "`shardings` must hold NamedShardings or PartitionSpecs, got"
                f" {sharding!r} at {path!r}; give jax.P() to a replicated parameter"
            )
    if any(mesh != meshes[0] for mesh in meshes):
        raise ValueError(
            f"`shardings` must live on one mesh, got {sorted(set(map(str, meshes)))}"
        )
    return meshes[0] if meshes else jax.sharding.get_abstract_mesh()


def _devices(names: Any, mesh: Any) -> int:
    """Over how many devices an axis is cut."""
    group = names if isinstance(names, tuple) else (names,)
    sizes = dict(mesh.shape)
    return math.prod(sizes.get(name, 1) for name in group if name is not None)


def _like(sharding: Any, spec: jax.P) -> Any:
    if isinstance(sharding, jax.NamedSharding):
        return jax.NamedSharding(sharding.mesh, spec)
    return spec


def _unboxed(box: Any) -> Any:
    (leaf,) = jax.tree.leaves(box)
    return leaf
