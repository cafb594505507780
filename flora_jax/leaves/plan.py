"""From leaf to matrix: one static decision per leaf, from its path and shape alone."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, TypeAlias

import jax

from flora_jax._typing import Axes, Shape

# Batch, row and column axes; or the reason why there are none.
Fold: TypeAlias = tuple[Axes, Axes, Axes] | str


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """How one leaf is folded to a matrix and which side of it is sketched.

    The matrix has ``rows`` x ``columns`` entries, per index of the batch axes. A dense
    leaf is kept uncompressed; its ``dense_reason`` says why.

    Attributes:
      path: normalized path of the leaf, for example ``"h/0/attn/c_attn/kernel"``.
      shape: shape of the leaf.
      batch_axes: axes that are kept and share one projection.
      row_axes: axes that are folded to the matrix's rows.
      column_axes: axes that are folded to its columns.
      axis: the sketched side, -1 for the columns (G Sᵀ), -2 for the rows (S G).
      rank: size r of the sketched side after sketching; 0 for a dense leaf, and where
        leaves are folded without being sketched.
      dense_reason: why the leaf is dense, or None if it is folded.
      key_path: the path from which its projection is sampled; empty without one.
      keep_logical_axes: as in :class:`flora_jax.LeafRules`.
      layer_shards: number of shards of the first batch axis, 0 if unknown.
    """

    path: str
    shape: Shape
    batch_axes: Axes = ()
    row_axes: Axes = ()
    column_axes: Axes = ()
    axis: int = -1
    rank: int = 0
    dense_reason: str | None = None
    key_path: str = ""
    keep_logical_axes: bool = dataclasses.field(default=False, compare=False)
    layer_shards: int = dataclasses.field(default=0, compare=False)

    @classmethod
    def of(cls, path: str, shape: Shape, fold: Fold, **settings: Any) -> LeafPlan:
        """The plan of a leaf with a fold, or that of a dense one for a reason."""
        if isinstance(fold, str):
            return cls(path, shape, dense_reason=fold)
        return cls(path, shape, *fold, **settings)

    @functools.cached_property
    def dense(self) -> bool:
        """Whether the leaf is kept as it is."""
        return self.dense_reason is not None

    @functools.cached_property
    def rows(self) -> int:
        """Number n of rows of the folded matrix."""
        return math.prod(self.shape[i] for i in self.row_axes)

    @functools.cached_property
    def columns(self) -> int:
        """Number m of columns of the folded matrix."""
        return math.prod(self.shape[i] for i in self.column_axes)

    @functools.cached_property
    def width(self) -> int:
        """Size of the sketched side of the folded matrix."""
        return self.columns if self.axis == -1 else self.rows

    @functools.cached_property
    def sketched_axes(self) -> Axes:
        """The leaf's axes that make up the sketched side."""
        return self.column_axes if self.axis == -1 else self.row_axes

    @functools.cached_property
    def groups(self) -> tuple[Axes, ...]:
        """The axes that are folded together: to rows, and to columns."""
        return () if self.dense else (self.row_axes, self.column_axes)

    @functools.cached_property
    def larger_smaller(self) -> tuple[Axes, Axes]:
        """Axes of the larger side and of the smaller one; the columns if square."""
        rows, columns = self.row_axes, self.column_axes
        return (columns, rows) if self.columns >= self.rows else (rows, columns)

    @functools.cached_property
    def state_shape(self) -> Shape:
        """Shape of the sketch in the state: r on the largest sketched axis, else 1.

        It has as many axes as the leaf, so that it inherits the leaf's sharding.
        """
        return self.resized(self.rank, None, self.shape)

    @functools.cached_property
    def ones(self) -> Shape:
        """The shape of an array that a leaf does not use."""
        return (1,) * len(self.shape)

    @functools.cached_property
    def _order(self) -> Axes:
        return self.batch_axes + self.row_axes + self.column_axes

    def resized(self, sketched: int | None, other: int | None, dense: Shape) -> Shape:
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
                largest = max(group, key=self.shape.__getitem__)
                for i in group:
                    shape[i] = size if i == largest else 1
        return tuple(shape)

    def fold(self, x: jax.Array) -> jax.Array:
        """Folds an array of the leaf's or the state's shape to (batch…, rows, columns).

        Args:
          x: the leaf, or its sketch in the state's shape.

        Returns:
          The matrix; one of its sides is ``rank`` long if ``x`` is a sketch.
        """
        batch = [x.shape[i] for i in self.batch_axes]
        rows = math.prod([x.shape[i] for i in self.row_axes])
        columns = math.prod([x.shape[i] for i in self.column_axes])
        return x.transpose(self._order).reshape(*batch, rows, columns)

    def unfold(self, matrix: jax.Array, shape: Shape) -> jax.Array:
        """Inverse of :meth:`fold`.

        Args:
          matrix: shape (batch…, rows, columns), or the sketch of such a matrix.
          shape: ``self.shape``, or ``self.state_shape`` for a sketch.

        Returns:
          The array of that shape.
        """
        order = self._order
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return matrix.reshape([shape[i] for i in order]).transpose(inverse)


def fold_axes(
    shape: Shape,
    min_dim_size: int,
    max_aspect_ratio: float,
    stacked: Axes = (),
    heads: Axes = (),
) -> Fold:
    """Batch, row and column axes of the fold, or the reason why there is none.

    Starting from the last two axes and adding one leading axis at a time, takes the
    first suffix whose most balanced split into rows and columns has both sides >=
    ``min_dim_size`` and an aspect ratio <= ``max_aspect_ratio``. Ties go to the earlier
    split. A stacked leaf is therefore folded in the same way as its slices.

    A leading axis that is longer than both sides of the matrix is not taken for a stack
    of layers or experts: the attention kernel (16384, 128, 128) is 16384x16384.

    Args:
      shape: the leaf's shape.
      min_dim_size: smallest side of a matrix worth sketching.
      max_aspect_ratio: largest ratio of the matrix's sides.
      stacked: axes that are known to be stacked: batch axes, wherever they stand.
      heads: axes that are known to be part of the matrix.

    Returns:
      Three tuples of axes, or a sentence.
    """
    stacked = tuple(i for i in stacked if i < len(shape))
    axes = tuple(i for i in range(len(shape)) if i not in stacked)
    sizes = [shape[i] for i in axes]
    if len(axes) < 2:
        return "it has fewer than two axes" + (" besides stacked ones" * bool(stacked))
    ndim, reason, hint = len(axes), "", ""
    # The shortest suffix first, so that layers and experts stay batch axes.
    for start in range(ndim - 2, -1, -1):
        splits = [
            (math.prod(sizes[start:s]), math.prod(sizes[s:]), s)
            for s in range(start + 1, ndim)
        ]
        # `min` returns the first of equals. Empty axes give sides of 0.
        n, m, split = min(splits, key=lambda t: max(t[:2]) / max(min(t[:2]), 1e-9))
        reason = matrix_reason(n, m, min_dim_size, max_aspect_ratio)
        if reason:
            continue
        before = axes[:start]
        if not any(i in heads or shape[i] > max(n, m) for i in before):
            batch = tuple(sorted((*stacked, *before)))
            return batch, axes[start:split], axes[split:]
        hint = (
            f"; if it is a stack of {n}x{m} matrices, say so by"
            " weight_dimension_numbers"
        )
    return reason + hint


def matrix_reason(n: int, m: int, min_dim_size: int, max_aspect: float) -> str:
    """Why an n x m matrix stays dense, or an empty string if it is sketched."""
    if min(n, m) < min_dim_size:
        return f"the smaller side of its {n}x{m} fold is below {min_dim_size=}"
    if max(n, m) > max_aspect * min(n, m):
        return f"the aspect ratio of its {n}x{m} fold exceeds {max_aspect:g}"
    return ""
