"""Which axes of a leaf form a matrix."""

from __future__ import annotations

import math
from typing import TypeAlias

from flora_jax._typing import Axes, Shape

# Batch, row and column axes; or the reason why there are none.
Fold: TypeAlias = tuple[Axes, Axes, Axes] | str


def fold_axes(
    shape: Shape, min_dim_size: int, max_aspect_ratio: float
) -> tuple[Axes, Axes, Axes] | str:
    """Batch, row and column axes of the fold, or the reason why there is none.

    Starting from the last two axes and adding one leading axis at a time, takes the
    first suffix whose most balanced split into rows and columns has both sides >=
    ``min_dim_size`` and an aspect ratio <= ``max_aspect_ratio``. Ties go to the earlier
    split. A stacked leaf is therefore folded in the same way as its slices.

    Args:
      shape: the leaf's shape.
      min_dim_size: smallest side of a matrix worth sketching.
      max_aspect_ratio: largest ratio of the matrix' sides.

    Returns:
      Three tuples of axes, or a sentence.
    """
    if len(shape) < 2:
        return "it has fewer than two axes"
    ndim, reason = len(shape), ""
    for start in range(ndim - 2, -1, -1):
        splits = [
            (math.prod(shape[start:s]), math.prod(shape[s:]), s)
            for s in range(start + 1, ndim)
        ]
        n, m, split = min(splits, key=lambda t: max(t[:2]) / max(min(t[:2]), 1e-9))
        reason = matrix_reason(n, m, min_dim_size, max_aspect_ratio)
        if not reason:
            axes = tuple(range(ndim))
            return axes[:start], axes[start:split], axes[split:]
    return reason


def matrix_reason(n: int, m: int, min_dim_size: int, max_aspect: float) -> str:
    """Why an n x m matrix stays dense, or an empty string if it is sketched."""
    if min(n, m) < min_dim_size:
        return f"the smaller side of its {n}x{m} fold is below {min_dim_size=}"
    if max(n, m) > max_aspect * min(n, m):
        return f"the aspect ratio of its {n}x{m} fold exceeds {max_aspect:g}"
    return ""
