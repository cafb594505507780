"""The one way from the arrays of a state to the parameters that they belong to."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax

from flora_jax._typing import PyTree
from flora_jax.leaves.paths import named_arrays

_Names: TypeAlias = tuple[str, ...]


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

    Warnings of ``init`` are left to whoever trains with it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
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
    below: dict[_Names, set[_Names]] = {}
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
        field = names[start - 1] if start else ""
        # The path of parameters that are a single array is empty: all paths end in it.
        other = start == len(names) and field in ("key", "spec")
        param = None if other else "/".join(names[start:])
        leaves.append(StateLeaf(leaf, param, field))
    return leaves
