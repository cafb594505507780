"""Where a state keeps its moments: by the names that optax gives their fields."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

# What a tree holds decides how it is moved to another basis, and how it is coded.
FIRST, SECOND, SUM = "first", "second", "sum"
KINDS = {
    "mu": FIRST,
    "ema": FIRST,
    "momentum": FIRST,
    "nu": SECOND,
    "trace": SUM,
    "acc_grads": SUM,
    "error": SUM,
}


def map_moments(fn: Callable[..., Any], state: Any, *others: Any) -> Any:
    """Replaces the parameter-shaped trees of moments inside a state.

    Args:
      fn: called with the field's name and that tree of each state; returns a tree.
      state: any optimizer state: NamedTuples, tuples, lists and dicts of them.
      *others: states of the same structure around the moments.

    Returns:
      The state with those trees replaced; nothing else is changed.
    """
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        fields = {}
        for name in cast(Any, state)._fields:
            values = [getattr(x, name) for x in (state, *others)]
            fields[name] = (
                fn(name, *values) if name in KINDS else map_moments(fn, *values)
            )
        return type(state)(**fields)
    if isinstance(state, tuple | list):
        return type(state)(
            map_moments(fn, *values) for values in zip(state, *others, strict=True)
        )
    if isinstance(state, dict):
        new = state.copy()  # Of the same kind: an OrderedDict has an order of its own.
        # As jax flattens the others: under jit they come back in that order.
        keys = state if isinstance(state, OrderedDict) else sorted(state)
        for key in keys:
            new[key] = map_moments(fn, *(x[key] for x in (state, *others)))
        return new
    return state


def find_moments(
    state: Any, fields: Collection[str] = tuple(KINDS)
) -> tuple[list[str], list[Any]]:
    """Field names and trees of the moments inside a state, in its order."""
    names, trees = [], []

    def note(name: str, tree: Any) -> Any:
        if name in fields:
            names.append(name)
            trees.append(tree)
        return tree

    map_moments(note, state)
    return names, trees


def replace_moments(
    state: Any, trees: Sequence[Any], fields: Collection[str] = tuple(KINDS)
) -> Any:
    """The state with other trees in the places that :func:`find_moments` finds."""
    rest = iter(trees)
    return map_moments(lambda name, x: next(rest) if name in fields else x, state)
