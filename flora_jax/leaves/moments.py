"""Locate the moments inside an optimizer state by the names of optax's fields."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax._typing import PyTree
from flora_jax.leaves.paths import named_leaves

# What a tree holds decides how it follows a change of basis, and how it is coded.
FIRST, SECOND, SUM = "first", "second", "sum"
KINDS = {
    **dict.fromkeys(("mu", "ema", "momentum"), FIRST),
    "nu": SECOND,
    **dict.fromkeys(("trace", "acc_grads", "error"), SUM),
}


def find_moments(
    state: Any, params: PyTree, fields: Collection[str] = KINDS
) -> list[dict[str, PyTree]]:
    """Trees of moments inside an optimizer state.

    A tree counts if its field has one of the names and its leaves are like the
    parameters: every path is that of a parameter with as many axes. A user's scalar
    ``error`` or a loss's ``trace`` does not.

    Args:
      state: any optimizer state.
      params: the parameters, or any tree with their paths and numbers of axes; None
        to take every tree under these names.
      fields: names out of :data:`KINDS`.

    Returns:
      For each NamedTuple with such fields, these by name.
    """
    groups: list[dict[str, PyTree]] = []
    _map_moments(groups.append, state, params, fields)
    return groups


def replace_moments(
    state: Any, params: PyTree, moments: list[PyTree], fields: Collection[str] = KINDS
) -> Any:
    """The state with other trees in the places that :func:`find_moments` finds."""
    rest = iter(moments)

    def replaced(group: dict[str, PyTree]) -> dict[str, PyTree]:
        return {name: next(rest) for name in group}

    return _map_moments(replaced, state, params, fields)


def _map_moments(
    function: Callable[[dict[str, PyTree]], dict[str, PyTree] | None],
    state: Any,
    params: PyTree,
    fields: Collection[str],
) -> Any:
    """Replaces the moments of each NamedTuple; None leaves them as they are."""
    axes = {path: jnp.ndim(leaf) for path, leaf in named_leaves(params)}

    def has_fields(node: Any) -> bool:
        return not set(fields).isdisjoint(getattr(node, "_fields", ()))

    def is_moment(tree: Any) -> bool:
        if not axes:  # No paths to compare, or nothing to compare them with.
            same = jax.tree.structure(tree) == jax.tree.structure(params)
            return params is None or same
        found = {(path, jnp.ndim(leaf)) for path, leaf in named_leaves(tree)}
        return bool(found) and found <= axes.items()

    def replaced(node: Any) -> Any:
        values = node._asdict()
        group = {k: v for k, v in values.items() if k in fields and is_moment(v)}
        new = dict(function(group) or group) if group else {}
        for name, value in values.items():
            if name not in group and not isinstance(value, jax.Array):
                new[name] = visit(value)
        return node._replace(**new)

    def visit(node: Any) -> Any:
        nodes, treedef = jax.tree.flatten(node, is_leaf=has_fields)
        new = [replaced(x) if hasattr(x, "_fields") else x for x in nodes]
        return jax.tree.unflatten(treedef, new)

    return visit(state)
