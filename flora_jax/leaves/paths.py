"""Leaves by their paths: the parameters, and what of a state belongs to each.

Paths are normalized: the same for dicts, NNX states and Linen boxes.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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


def is_masked(x: Any) -> bool:
    """Whether x stands for a leaf that ``optax.masked`` leaves to others."""
    return isinstance(x, optax.MaskedNode)


def named_arrays(tree: PyTree) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields the names along the path of each array, or MaskedNode in its place.

    Without the names of boxes, so that the states of one optimizer under NNX and under
    plain trees have the same.
    """
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_masked)[0]:
        keys = path[:-1] if path[-1:] == (_VALUE,) else path
        yield tuple(jax.tree_util.keystr((key,), simple=True) for key in keys), leaf


class StateLeaf(NamedTuple):
    """One array of an optimizer state.

    Attributes:
      leaf: the array, or the ``optax.MaskedNode`` in place of another's.
      param: path of the parameter that it belongs to, or None for counters and keys.
      field: name of the parameter-shaped tree that it is part of, such as ``mu``.
    """

    leaf: Any
    param: str | None
    field: str


def abstract_state(init: Callable[[PyTree], PyTree], params: PyTree) -> PyTree:
    """Shapes and dtypes of ``init(params)``; allocates nothing.

    Warnings of ``init`` are suppressed here; they are issued when training starts.
    """
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        return jax.eval_shape(init, params)


def state_leaves(state: PyTree, params: PyTree) -> list[StateLeaf]:
    """Finds the parameter that each array of a state belongs to.

    A part of the state is shaped as the parameters are if below it each of their paths
    is found; the name of one parameter alone may be that of something else.

    Args:
      state: any state, or the shapes of it; NNX Variables and Linen boxes count as the
        arrays inside of them.
      params: the parameters, or the shapes of them.

    Returns:
      One entry for each of ``jax.tree.leaves(state, is_leaf=is_masked)``.
    """
    paths = {names for names, _ in named_arrays(params)}
    found = list(named_arrays(state))
    below: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for names, _ in found:
        for i in range(len(names) + 1):
            if names[i:] in paths:
                below.setdefault(names[:i], set()).add(names[i:])
    leaves = []
    for names, leaf in found:
        starts = (i for i in range(len(names) + 1) if names[i:] in paths)
        start = next((i for i in starts if len(below[names[:i]]) == len(paths)), None)
        if start is None:
            leaves.append(StateLeaf(leaf, None, ""))
            continue
        # Trees in a tuple have the name of its field.
        field = next((x for x in reversed(names[:start]) if not x.isdigit()), "")
        # The path of parameters that are a single array is empty: all paths end in it.
        other = start == len(names) and field in ("key", "spec")
        param = None if other else "/".join(names[start:])
        leaves.append(StateLeaf(leaf, param, field))
    return leaves
