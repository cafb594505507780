"""The largest rank whose state fits a budget of bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from flora_jax import _validation as check
from flora_jax._typing import PyTree, Shape
from flora_jax.leaves.boxes import is_masked
from flora_jax.leaves.moments import KINDS
from flora_jax.leaves.paths import named_leaves
from flora_jax.leaves.state_leaves import StateLeaf, abstract_state, state_leaves


def rank_for_budget(
    make: Callable[[int], Any], params: PyTree, budget_bytes: int
) -> int:
    """Finds the largest rank for all leaves whose optimizer state fits a budget.

    The bytes are those of ``make(rank).init(params)``, counted without allocation:
    moments, stored bases, dense leaves, counters and keys. Parameters, gradients and
    activations are not included. At a rank of a leaf's width or more the leaf is dense:
    the largest rank that is tried is the width of the widest sketched side, at which
    nothing is sketched any more.

    A state grows with the rank until a leaf becomes dense, where the state of some
    optimizers shrinks (a basis is no longer stored): the search starts at the largest
    width whose state fits, and bisects up to the next.

    Cost: one abstract evaluation of ``init`` for each width, and about log2 of the
    widest.

    Args:
      make: a callable from a rank to the transformation, for example
        ``lambda rank: fj.flora(1e-3, rank)``.
      params: parameters, or ShapeDtypeStructs of them.
      budget_bytes: largest size of the whole state in bytes, summed over devices.

    Returns:
      The rank. The widest side's size means that the budget holds the uncompressed
      state.

    Raises:
      TypeError: for arguments of a wrong type.
      ValueError: for a budget that rank 1 exceeds; for a ``make`` that sketches
        nothing.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flora_jax as fj
      >>> params = {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)}
      >>> fj.rank_for_budget(lambda rank: fj.flora(1e-3, rank), params, 8 * 2**20)
      509
    """
    budget = check_budget(budget_bytes, make)
    state = _state(make, 1, params)
    shapes = {path: leaf.shape for path, leaf in named_leaves(params)}
    # A sketch of rank 1 keeps one of the sketched side's directions.
    widths = {
        math.prod(shapes[leaf.param]) // math.prod(leaf.leaf.shape)
        for leaf in state_leaves(state, params)
        if leaf.param is not None and is_sketch(leaf, shapes)
    }
    if not widths:
        raise ValueError(
            "`make` must sketch some leaf of `params`, got a transformation that keeps"
            " all of them dense at rank 1; see flora_jax.plan_leaves for the reasons"
        )
    if tree_bytes(state) > budget:
        raise ValueError(
            "`budget_bytes` must hold the state at rank 1, which takes"
            f" {tree_bytes(state)} bytes, got budget_bytes={budget}; give more, sketch"
            " more leaves, or use an optimizer with less state for dense leaves"
        )
    starts = sorted({1, *widths})
    ends = [*starts[1:], starts[-1] + 1]
    fits, too_large = next(
        (start, end)
        for start, end in zip(reversed(starts), reversed(ends), strict=True)
        if start == 1 or state_bytes(make, start, params) <= budget
    )
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        if state_bytes(make, middle, params) <= budget:
            fits = middle
        else:
            too_large = middle
    return fits


def check_budget(budget_bytes: Any, make: Any) -> int:
    """Returns the budget as an int; raises unless it is one and ``make`` callable."""
    budget = check.check_positive_int(
        "budget_bytes", budget_bytes, "pass whole bytes, for example 2 * 1024**3"
    )
    if not callable(make):
        raise TypeError(
            f"`make` must be a callable from ranks to a transformation, got {make!r};"
            " pass for example lambda rank: flora_jax.flora(1e-3, rank)"
        )
    return budget


def is_sketch(leaf: StateLeaf, shapes: dict[str, Shape]) -> bool:
    """Whether an array of state is a sketch of the moment of a parameter.

    Args:
      leaf: the array.
      shapes: of the parameters, by path.
    """
    if leaf.param is None or leaf.field not in KINDS or is_masked(leaf.leaf):
        return False
    shape, own = shapes[leaf.param], leaf.leaf.shape
    return len(own) == len(shape) and math.prod(own) != math.prod(shape)


def _state(make: Callable[[Any], Any], rank: Any, params: PyTree) -> PyTree:
    def init(params: PyTree) -> PyTree:  # With what `make` itself warns of.
        return check.check_transformation("make(rank)", make(rank)).init(params)

    return abstract_state(init, params)


def state_bytes(make: Callable[[Any], Any], rank: Any, params: PyTree) -> int:
    """Bytes of the state of ``make(rank)``; allocates nothing."""
    return tree_bytes(_state(make, rank, params))


def tree_bytes(tree: PyTree) -> int:
    """Bytes of arrays, or of the shapes and dtypes of them."""
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )
