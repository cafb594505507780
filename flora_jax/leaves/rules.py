"""The user's rules about leaves, and the plans that follow from them."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from flora_jax import _validation as _checks
from flora_jax.leaves.plan import Axes, LeafPlan, fold_axes, matrix_reason

SIDES = ("smaller", "larger", "left", "right")
LeafRule: TypeAlias = Callable[[str, tuple[int, ...]], Any]
_BY_RULE = object()
_MADE: contextvars.ContextVar[list[LeafPlan] | None] = contextvars.ContextVar(
    "plans", default=None
)


@contextlib.contextmanager
def collected_plans() -> Iterator[list[LeafPlan]]:
    """Collects the plans of sketches that are made inside of it."""
    plans: list[LeafPlan] = []
    token = _MADE.set(plans)
    try:
        yield plans
    finally:
        _MADE.reset(token)


@dataclasses.dataclass(frozen=True)
class LeafRules:
    """The user's rules for planning leaves; see :func:`plan_leaves` for each.

    ``sketches`` is False where leaves are folded for something else.
    """

    rank: Any
    mask: Any = None
    min_dim_size: int = 128
    max_aspect_ratio: float = 16
    side: str = "smaller"
    weight_dimension_numbers: Any = None
    sketches: bool = True

    def __post_init__(self) -> None:
        """Raises on bad arguments, before anything is traced."""
        if self.rank is None or (_is_scalar(self.rank) and not callable(self.rank)):
            _check_rank(self.rank)
        for name in ("rank", "mask"):
            if callable(getattr(self, name)):
                _checks.check_leaf_rule(name, getattr(self, name))
        if _is_scalar(self.mask) and not callable(self.mask):
            raise TypeError(
                "`mask` must be a callable of (path, shape) or a tree of bools, got"
                f" mask={self.mask!r}; use None to sketch every leaf that folds"
            )
        _checks.check_positive_int(
            "min_dim_size", self.min_dim_size, "use 1 to sketch every matrix"
        )
        _checks.check_number(
            "max_aspect_ratio", self.max_aspect_ratio, 1, None, "use 16, or math.inf"
        )
        _checks.check_choice("side", self.side, SIDES)

    def plan(self, params: Any) -> list[LeafPlan]:
        """Plans of all leaves, in the order of ``jax.tree.leaves(params)``.

        Args:
          params: parameters, gradients or their ShapeDtypeStructs.

        Returns:
          One plan per array leaf.

        Raises:
          TypeError: for a leaf whose dtype is not a real floating one.
          ValueError: for a rank, mask or dimension numbers that do not fit a leaf.
        """
        if not jax.tree.leaves(params):  # Also optax's placeholder for parameters.
            return []
        ranks = _by_path("rank", self.rank, None)
        masks = _by_path("mask", self.mask, True)
        numbers = self.weight_dimension_numbers
        if callable(numbers) and not _is_dimension_numbers(numbers):
            numbers = numbers(params)
        numbers = _by_path("weight_dimension_numbers", numbers, _BY_RULE)
        plans = []
        for path, leaf in named_leaves(params):
            shape = tuple(jnp.shape(leaf))
            _check_real(path, leaf)
            fold = self._fold(path, shape, numbers(path, shape))
            if not masks(path, shape):
                fold = "the mask leaves it out"
            rank = 0
            if not isinstance(fold, str):
                rank = _check_rank(ranks(path, shape), path)
            plans.append(self._plan(path, shape, fold, rank))
        made = _MADE.get()
        if made is not None and self.sketches:
            made += plans
        return plans

    def _fold(self, path: str, shape: tuple[int, ...], numbers: Any) -> Any:
        """The fold by the rule, or by the user's dimension numbers."""
        if numbers is _BY_RULE:
            return fold_axes(shape, self.min_dim_size, self.max_aspect_ratio)
        if numbers is None:
            return "weight_dimension_numbers leave it out"
        if len(shape) < 2:
            return "it has fewer than two axes"
        rows = _normalise(path, shape, numbers.reduction_axis)
        columns = _normalise(path, shape, numbers.output_axis)
        if not rows or not columns or len({*rows, *columns}) < len(rows + columns):
            raise ValueError(
                f"`weight_dimension_numbers` of leaf {path!r} must name disjoint,"
                f" non-empty axes, got {numbers} for shape {shape}; name each axis once"
            )
        n = math.prod(shape[i] for i in rows)
        m = math.prod(shape[i] for i in columns)
        batch = tuple(i for i in range(len(shape)) if i not in rows + columns)
        reason = matrix_reason(n, m, self.min_dim_size, self.max_aspect_ratio)
        return reason or (batch, rows, columns)

    def _plan(self, path: str, shape: tuple[int, ...], fold: Any, rank: int) -> Any:
        if isinstance(fold, str):
            return LeafPlan(path, shape, dense_reason=fold)
        plan = LeafPlan(path, shape, *fold, rank=rank)
        n, m = plan.rows, plan.columns
        columns = {
            "smaller": m <= n,  # A square matrix is sketched on its columns,
            "larger": m > n,  # or on its rows if the larger side is asked for.
            "right": True,
            "left": False,
        }[self.side]
        plan = dataclasses.replace(plan, axis=-1 if columns else -2)
        if rank >= plan.width:
            reason = f"{rank=} is not below the sketched side of its {n}x{m} fold"
            plan = LeafPlan(path, shape, dense_reason=reason)
        return plan


def plan_leaves(
    params: Any,
    rank: Any,
    *,
    mask: Any = None,
    min_dim_size: int = 128,
    max_aspect_ratio: float = 16,
    side: str = "smaller",
    weight_dimension_numbers: Any = None,
) -> Any:
    """Tells how each leaf of a tree would be folded and sketched; allocates nothing.

    Trees given for ``rank``, ``mask`` and ``weight_dimension_numbers`` are looked up by
    normalised path: ``jax.tree_util.keystr(path, simple=True, separator="/")`` without
    the ``/value`` that NNX Variables and Linen boxes add. They have an entry for every
    leaf; prefixes of the parameters' structure are not enough.

    Args:
      params: parameters, or ShapeDtypeStructs of them.
      rank: sketch size r: an int >= 1, a callable of (path, shape), or a tree of ints.
      mask: None, a callable of (path, shape), or a tree of bools; True means that the
        leaf may be sketched, False keeps it dense.
      min_dim_size: smallest side of a matrix that is sketched; 128 as in Adafactor.
      max_aspect_ratio: largest ratio of its sides; 16 as in the paper's accumulation.
      side: ``"smaller"``, ``"larger"``, ``"left"`` (rows) or ``"right"`` (columns).
        A square matrix is sketched on its columns by ``"smaller"``, on its rows by
        ``"larger"``. The smaller side leaves r·max(n, m) numbers.
      weight_dimension_numbers: None, or which axes form the matrix, as in optax: a
        ``MuonDimensionNumbers`` or ``GaLoreDimensionNumbers`` for all leaves, a tree of
        them (None leaves a leaf dense), or a callable from params to such a tree. Axes
        that are not named are batch axes.

    Returns:
      A tree of :class:`LeafPlan` with the structure of ``params``.

    Raises:
      TypeError: for arguments of a wrong type, and for complex or integer leaves.
      ValueError: for arguments out of range, or that do not fit a leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> import flora_jax as fj
      >>> params = {"w": jnp.zeros((256, 512)), "b": jnp.zeros(512)}
      >>> plans = fj.plan_leaves(params, rank=32)
      >>> plans["w"].state_shape, plans["b"].dense_reason
      ((32, 512), 'it has fewer than two axes')
    """
    rules = LeafRules(
        rank, mask, min_dim_size, max_aspect_ratio, side, weight_dimension_numbers
    )
    return jax.tree.unflatten(jax.tree.structure(params), rules.plan(params))


def named_leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yields (normalised path, leaf); the path is the same for NNX, Linen and dicts."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield normalise_path(path), leaf


def normalise_path(path: Any) -> str:
    """A key path as text, without the attribute ``value`` of Variables and boxes."""
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _by_path(name: str, value: Any, default: Any) -> LeafRule:
    """Makes one function of (path, shape) of the forms that a rule comes in."""
    if value is None:
        return lambda path, shape: default
    if _is_dimension_numbers(value) or _is_scalar(value):
        return value if callable(value) else lambda path, shape: value
    table = {
        normalise_path(path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(
            value, is_leaf=lambda x: x is None or _is_dimension_numbers(x)
        )[0]
    }

    def look_up(path: str, shape: tuple[int, ...]) -> Any:
        if path not in table:
            raise ValueError(
                f"`{name}` has no entry for leaf {path!r} of shape {shape}, got entries"
                f" for {sorted(table)}; give it the structure of the parameters"
            )
        return table[path]

    return look_up


def _is_dimension_numbers(value: Any) -> bool:
    return hasattr(value, "reduction_axis") and hasattr(value, "output_axis")


def _normalise(path: str, shape: tuple[int, ...], axes: Any) -> Axes:
    """Axes as a tuple of non-negative ints."""
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    if any(not -len(shape) <= i < len(shape) for i in axes):
        raise ValueError(
            f"`weight_dimension_numbers` of leaf {path!r} name axes {axes}, got shape"
            f" {shape}; name axes that the leaf has"
        )
    return tuple(i % len(shape) for i in axes)


def _check_rank(rank: Any, path: str | None = None) -> int:
    where = "" if path is None else f" for leaf {path!r}"
    return _checks.check_positive_int(
        "rank", rank, f"pass the sketch size{where}, for example a quarter of the width"
    )


def _is_scalar(value: Any) -> bool:
    """Whether a rule is one value or callable, and not a tree of values by path."""
    return jax.tree_util.all_leaves([value])


def _check_real(path: str, leaf: Any) -> None:
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"leaf {path!r} must have a real floating dtype, got {dtype}; leave it out"
            " with optax.masked, or split complex parameters with"
            " optax.contrib.split_real_and_imaginary"
        )
