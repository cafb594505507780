"""Types that several layers share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Array, UInt32

# Trees have no static type of their own in Python.
PyTree: TypeAlias = Any
Shape: TypeAlias = tuple[int, ...]
Axes: TypeAlias = tuple[int, ...]

# Key data; jaxtyping is not needed to run.
KeyData: TypeAlias = "UInt32[Array, '2']"
KeyLike: TypeAlias = int | np.integer | jax.Array | np.ndarray | tuple[int, int]
# An int, a fraction of the sketched side, a callable of (path, shape), a mapping from
# path patterns to any of these, or a tree of ints.
RankSpec: TypeAlias = float | Callable[[str, Shape], float] | Mapping | PyTree
# A callable of (path, shape), or a tree of bools.
LeafMask: TypeAlias = Callable[[str, Shape], bool] | PyTree | None
AxisNames: TypeAlias = str | tuple[str, ...]
