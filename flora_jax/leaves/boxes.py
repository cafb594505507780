"""NNX Variables and Linen boxes around arrays: by their methods, without flax."""

from __future__ import annotations

from typing import Any

import jax
import optax

from flora_jax._typing import PyTree, Shape
from flora_jax.leaves.shardings import fit_names, fit_sharding

# Metadata of a Variable that name a mesh axis for each of its array's axes.
_SHARDINGS = ("out_sharding", "optimizer_sharding")


def _is_variable(x: Any) -> bool:
    return hasattr(x, "get_metadata") and hasattr(x, "get_value")


def _is_boxed(x: Any) -> bool:
    return _is_variable(x) or (hasattr(x, "replace_boxed") and hasattr(x, "names"))


def is_box(x: Any) -> bool:
    """Whether x is an NNX Variable or a Linen box around one array."""
    # A box that optax.masked has emptied is left to jax as any other node.
    return _is_boxed(x) and len(jax.tree.leaves(x)) == 1


def is_masked(x: Any) -> bool:
    """Whether x stands for a leaf that ``optax.masked`` leaves to others."""
    return isinstance(x, optax.MaskedNode)


def unboxed(tree: PyTree) -> PyTree:
    """The tree with what boxes hold in their place: an array, or a MaskedNode."""

    def content(box: Any) -> list[Any]:
        return jax.tree.leaves(box, is_leaf=is_masked)

    def is_full(x: Any) -> bool:
        return _is_boxed(x) and len(content(x)) == 1

    return jax.tree.map(
        lambda x: content(x)[0] if is_full(x) else x, tree, is_leaf=is_full
    )


def rebox(box: Any, old: Shape, value: jax.Array) -> Any:
    """The same kind of box around an array of state, with shardings that fit it.

    Args:
      box: the parameter's.
      old: the parameter's shape.
      value: the array.
    """
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    if not _is_variable(box):
        return box.replace(
            value=value, names=fit_names(box.names, old, value.shape, sizes)
        )
    metadata = {}
    for name in _SHARDINGS:
        given = box.get_metadata().get(name)
        if isinstance(given, jax.NamedSharding):
            metadata[name] = fit_sharding(given, old, value.shape)
        elif given is not None:
            metadata[name] = fit_names(given, old, value.shape, sizes)
    return box.copy(value, **metadata)
