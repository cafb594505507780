"""Shardings of an optimizer state, from those of the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flora_jax import _validation as check
from flora_jax._typing import Axes, PyTree, Shape
from flora_jax.leaves.boxes import named_nodes
from flora_jax.leaves.mesh import MeshAxes, fit_sharding, mesh_axes
from flora_jax.leaves.paths import abstract_state, is_masked, named_leaves, state_leaves
from flora_jax.leaves.rules import LeafRules


def state_sharding(
    tx: optax.GradientTransformation, params: PyTree, shardings: PyTree
) -> PyTree:
    """Returns the shardings of an optimizer state, from those of the parameters.

    Each array of a parameter-shaped tree keeps the parameter's mesh axes on every axis
    that has the parameter's size. An axis of another size, the rank of a sketch, keeps
    them if they divide it; those of axes that are folded to one side, such as (heads,
    head_dim), move to the one that holds the rank. Where the rank equals the size of
    that axis, shapes do not show it: leaves are taken to fold by the default rules.
    Everything else, counters and keys, is replicated.
    NNX Variables and Linen boxes name such shardings in their metadata, where trainers
    look for them.

    Nothing is allocated. Give the result to ``jax.jit`` as ``out_shardings`` of
    ``tx.init`` and of the training step, and run both under ``jax.set_mesh``: there the
    projections know of the mesh, and sketch a sharded side as a sum over devices;
    elsewhere the compiler may gather gradients. An exact singular value decomposition
    gathers them in any case; the randomized one does not.

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
      TypeError: if ``tx`` is not a transformation, or a leaf of ``shardings`` is
        neither.
      ValueError: if ``shardings`` does not have the structure of ``params``, or spans
        several meshes.
    """
    tx = check.check_transformation("tx", tx, params)
    given = dict(named_leaves(shardings))
    shapes = {path: leaf.shape for path, leaf in named_leaves(params)}
    if given.keys() != shapes.keys():
        missing = sorted(shapes.keys() ^ given.keys())
        raise ValueError(
            "`shardings` must have one entry for each parameter, got trees that differ"
            f" at {missing}; map the parameters to their shardings with jax.tree.map"
        )
    mesh = _mesh(given)
    named = isinstance(next(iter(given.values()), None), jax.NamedSharding)
    replicated = jax.NamedSharding(mesh, jax.P()) if named else jax.P()
    state = abstract_state(tx.init, params)
    axes, places = mesh_axes(mesh), []
    floats = {path: x for path, x in named_nodes(params) if _is_floating(x)}
    folds = {plan.path: plan.groups for plan in LeafRules().plan(floats)}
    for leaf, path, field in state_leaves(state, params):
        if is_masked(leaf):  # Its parameter is another transformation's.
            places.append(leaf)
        # Arrays with other axes are not of this package: optax's factored moments.
        elif path is None or len(leaf.shape) != len(shapes[path]):
            places.append(replicated)
        else:
            of_scales = field == "scales" and leaf.shape
            fit, old = _fit_scales if of_scales else fit_sharding, shapes[path]
            groups = folds.get(path, ())
            groups = [x for x in groups if _holds_equal_rank(x, old, leaf.shape)]
            places.append(fit(given[path], old, leaf.shape, axes, groups))
    return jax.tree.unflatten(jax.tree.structure(state, is_leaf=is_masked), places)


def _is_floating(node: Any) -> bool:
    """Whether a leaf, or the one in a box, is of those that are sketched."""
    (leaf,) = jax.tree.leaves(node)
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _holds_equal_rank(group: Axes, old: Shape, new: Shape) -> bool:
    """Whether all but one of a group's axes are 1 now, and that one is as it was."""
    kept = [i for i in group if new[i] > 1]
    return len(kept) == 1 and new[kept[0]] == old[kept[0]] and len(group) > 1


def _fit_scales(
    sharding: Any, old: Shape, new: Shape, axes: MeshAxes, groups: Sequence[Axes]
) -> Any:
    """The sharding of a code's scales, from that of its parameter.

    They have the axes of the moment but for that of the rows, the last or the longest,
    whose names move nowhere.
    """
    every = range(len(new))
    row = max(every, key=lambda i: (new[i] == 1, i == every[-1], old[i]))
    moment = (*new[:row], old[row], *new[row + 1 :])
    fitted = fit_sharding(sharding, old, moment, axes, groups)
    named = isinstance(fitted, jax.NamedSharding)
    spec = fitted.spec if named else fitted
    kept = jax.P(*(None if n == 1 else x for x, n in zip(spec, new, strict=True)))
    return jax.NamedSharding(fitted.mesh, kept) if named else kept


def _mesh(shardings: dict[str, Any]) -> Any:
    """The mesh of all shardings, or that of the context."""
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
