"""The largest rank whose state fits a budget of bytes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import jax

from flora_jax import _validation as _checks
from flora_jax.leaves.rules import collected_plans


def rank_for_budget(make: Callable[[int], Any], params: Any, budget_bytes: int) -> int:
    """Finds the largest rank for all leaves whose optimizer state fits a budget.

    The bytes are those of ``make(rank).init(params)``, counted without allocation:
    moments, stored bases, dense leaves, counters and keys. Parameters, gradients and
    activations are not in them. Above the width of a leaf a rank keeps the leaf dense:
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
    with collected_plans() as plans:
        smallest = state_bytes(make, 1, params)
    widths = [plan.width for plan in plans if plan.dense_reason is None]
    if not widths:
        raise ValueError(
            "`make` must sketch some leaf of `params`, got a transformation that keeps"
            " all of them dense at rank 1; see flora_jax.plan_leaves for the reasons"
        )
    if smallest > budget:
        raise ValueError(
            f"`budget_bytes` must hold the state at rank 1, which takes {smallest}"
            f" bytes, got budget_bytes={budget}; give more, sketch more leaves, or use"
            " an optimizer with less state for dense leaves"
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
    """Returns the budget as an int, or raises for what is none or cannot be called."""
    budget = _checks.check_positive_int(
        "budget_bytes", budget_bytes, "pass whole bytes, for example 2 * 1024**3"
    )
    if not callable(make):
        raise TypeError(
            f"`make` must be a callable from ranks to a transformation, got {make!r};"
            " pass for example lambda rank: flora_jax.flora(1e-3, rank=rank)"
        )
    return budget


def state_bytes(make: Callable[[Any], Any], rank: Any, params: Any) -> int:
    """Bytes of the state of ``make(rank)``; allocates nothing."""
    with warnings.catch_warnings():
        # They are about one candidate: whoever trains with it is told again.
        warnings.simplefilter("ignore", UserWarning)
        tx = _checks.check_transformation("make(rank)", make(rank))
        # A function that is new each time: JAX would not run init again for the plans.
        state = jax.eval_shape(lambda params: tx.init(params), params)
    return sum(map(array_bytes, jax.tree.leaves(state)))


def array_bytes(leaf: Any) -> int:
    """Bytes of an array, or of the shape and dtype of one."""
    return math.prod(leaf.shape) * leaf.dtype.itemsize
