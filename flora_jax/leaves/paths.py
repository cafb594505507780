"""Normalized paths of leaves: the same for dicts, NNX states and Linen boxes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import optax

from flora_jax._typing import PyTree

_VALUE = jax.tree_util.GetAttrKey("value")
_text = functools.partial(jax.tree_util.keystr, simple=True, separator="/")


def normalize_path(path: tuple[Any, ...]) -> str:
    """A key path as text, without the attribute ``value`` of Variables and boxes."""
    return _text(path[:-1] if path[-1:] == (_VALUE,) else path)


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """Normalized path and leaf of each leaf, in the order of ``jax.tree.leaves``."""
    return [
        (normalize_path(path) if path[-1:] == (_VALUE,) else _text(path), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]


def named_arrays(tree: PyTree) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields the names along the path of each array, or MaskedNode in its place.

    Without the names of boxes, so that the states of one optimizer under NNX and under
    plain trees have the same.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
    )
    for path, leaf in flat:
        keys = path[:-1] if path[-1:] == (_VALUE,) else path
        yield tuple(jax.tree_util.keystr((key,), simple=True) for key in keys), leaf
