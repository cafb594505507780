"""From leaf to matrix: one static decision per leaf, from its path and shape alone."""

from __future__ import annotations

import dataclasses
import math
from typing import TypeAlias

import jax

Axes: TypeAlias = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """How one leaf is folded to a matrix and which side of it is sketched.

    The matrix has ``rows`` x ``columns`` entries, per index of the batch axes. A dense
    leaf is kept uncompressed; its ``dense_reason`` says why.

    Attributes:
      path: normalised path of the leaf, for example ``"h/0/attn/c_attn/kernel"``.
      shape: shape of the leaf.
      batch_axes: axes that are kept and share one projection.
      row_axes: axes that are folded to the matrix' rows.
      column_axes: axes that are folded to its columns.
      axis: the sketched side, -1 for the columns (G Sᵀ), -2 for the rows (S G).
      rank: size r of the sketched side after sketching; 0 for a dense leaf.
      dense_reason: why the leaf is dense, or None if it is sketched.
    """

    path: str
    shape: tuple[int, ...]
    batch_axes: Axes = ()
    row_axes: Axes = ()
    column_axes: Axes = ()
    axis: int = -1
    rank: int = 0
    dense_reason: str | None = None

    @property
    def rows(self) -> int:
        """Number n of rows of the folded matrix."""
        return math.prod(self.shape[i] for i in self.row_axes)

    @property
    def columns(self) -> int:
        """Number m of columns of the folded matrix."""
        return math.prod(self.shape[i] for i in self.column_axes)

    @property
    def width(self) -> int:
        """Size of the sketched side of the folded matrix."""
        return self.columns if self.axis == -1 else self.rows

    @property
    def sketched_axes(self) -> Axes:
        """The leaf's axes that make up the sketched side."""
        return self.column_axes if self.axis == -1 else self.row_axes

    @property
    def state_shape(self) -> tuple[int, ...]:
        """Shape of the sketch in the state: r on the largest sketched axis, else 1.

        It has as many axes as the leaf, so that it inherits the leaf's sharding.
        """
        return self.resized(self.rank, None, self.shape)

    def resized(
        self, sketched: int | None, other: int | None, dense: tuple[int, ...]
    ) -> tuple[int, ...]:
        """Shape of an array of state that has other sides than the leaf's matrix.

        A new size stands on the side's largest axis; its other axes are 1.

        Args:
          sketched: size of the sketched side, or None to keep its axes.
          other: size of the other side, or None to keep its axes.
          dense: what to return for a dense leaf.

        Returns:
          A shape with as many axes as the leaf.
        """
        if self.dense_reason is not None:
            return dense
        shape = list(self.shape)
        axes = self.row_axes if self.axis == -1 else self.column_axes
        for group, size in ((self.sketched_axes, sketched), (axes, other)):
            if size is not None:
                largest = max(group, key=lambda i: self.shape[i])
                for i in group:
                    shape[i] = size if i == largest else 1
        return tuple(shape)

    @property
    def ones(self) -> tuple[int, ...]:
        """The shape of an array that a leaf does not use."""
        return (1,) * len(self.shape)

    def _order(self) -> Axes:
        return self.batch_axes + self.row_axes + self.column_axes

    def fold(self, x: jax.Array) -> jax.Array:
        """Folds an array of the leaf's or the state's shape to (batch…, rows, columns).

        Args:
          x: the leaf, or its sketch in the state's shape.

        Returns:
          The matrix; one of its sides is ``rank`` long if ``x`` is a sketch.
        """
        batch = tuple(x.shape[i] for i in self.batch_axes)
        rows = math.prod(x.shape[i] for i in self.row_axes)
        columns = math.prod(x.shape[i] for i in self.column_axes)
        return x.transpose(self._order()).reshape(*batch, rows, columns)

    def unfold(self, matrix: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Inverse of :meth:`fold`.

        Args:
          matrix: shape (batch…, rows, columns), or the sketch of such a matrix.
          shape: ``self.shape``, or ``self.state_shape`` for a sketch.

        Returns:
          The array of that shape.
        """
        order = self._order()
        inverse = sorted(range(len(order)), key=lambda i: order[i])
        return matrix.reshape([shape[i] for i in order]).transpose(inverse)


def fold_axes(
    shape: tuple[int, ...], min_dim_size: int, max_aspect_ratio: float
) -> tuple[Axes, Axes, Axes] | str:
    """Batch, row and column axes of the fold, or the reason why there is none.

    The shortest suffix of axes wins whose most balanced split (ties: the first) has
    both sides >= ``min_dim_size`` and an aspect ratio <= ``max_aspect_ratio``; a
    stacked leaf therefore folds as its slices do.

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
