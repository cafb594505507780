"""Rules about leaves, given by path, and the folds that follow from them."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.core
import jax.numpy as jnp
from optax.contrib import MuonDimensionNumbers

from flora_jax import _validation
from flora_jax._typing import Axes, LeafMask, PyTree, Shape
from flora_jax.leaves import boxes
from flora_jax.leaves.paths import named_leaves, normalize_path
from flora_jax.leaves.plan import Fold, LeafPlan, fold_axes, matrix_reason

# Names of embeddings and output heads in Flax, GPT-2, T5, Llama, Gemma and MaxText.
_EMBEDDING = re.compile(
    r"(^|[/.])(embed|embedder|embedding|embeddings|embed_tokens|input_embedding|lm_head"
    r"|logits_dense|position_embedder|pos_embedding|relative_attention_bias|shared"
    r"|token_embedder|wpe|wte)([/.]|$)"
)


@dataclasses.dataclass(frozen=True)
class ByPath:
    """A tree or a mapping of settings, as hashable pairs of a path and a value.

    Attributes:
      entries: the pairs; a path may be a pattern with ``*``, ``?`` and ``[…]``.
    """

    entries: tuple[tuple[str, Any], ...]

    @functools.cached_property
    def _exact(self) -> dict[str, Any]:
        return dict(self.entries)

    def find(self, name: str, path: str, shape: Shape) -> Any:
        """The value of a path: its own entry, else that of the first pattern.

        Raises:
          ValueError: if there is neither.
        """
        if path in self._exact:
            return self._exact[path]
        for pattern, value in self.entries:
            if fnmatch.fnmatchcase(path, pattern):
                return value
        raise ValueError(
            f"`{name}` has no entry for leaf {path!r} of shape {shape}, got entries for"
            f" {sorted(self._exact)}; give it the structure of the parameters, or a"
            " pattern such as '*' for the other leaves"
        )


def by_path(value: Any, freeze: Callable[[Any], Any] = lambda x: x) -> Any:
    """Makes a tree or mapping hashable; one value or callable stays as it is."""
    if value is None or isinstance(value, ByPath) or is_scalar(value):
        return value
    return ByPath(tuple((path, freeze(leaf)) for path, leaf in _entries(value)))


def _entries(value: Any) -> list[tuple[str, Any]]:
    """Paths and leaves; those of dicts in their own order, as patterns have one."""
    if type(value) is dict:
        return [
            (f"{key}/{path}" if path else str(key), leaf)
            for key, below in value.items()
            for path, leaf in _entries(below)
        ]
    flat, _ = jax.tree_util.tree_flatten_with_path(value, is_leaf=_is_entry)
    return [(normalize_path(path), leaf) for path, leaf in flat]


def is_scalar(value: Any) -> bool:
    """Whether a rule is a single value or a callable, not None or per-path values."""
    leaf = _is_dimension_numbers(value) or jax.tree_util.all_leaves([value])
    return leaf and not isinstance(value, ByPath)


def _is_entry(x: Any) -> bool:
    return x is None or _is_dimension_numbers(x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafRules:
    """Which leaves are folded to matrices, and by which axes.

    Attributes:
      mask: None, a callable of (path, shape), or a tree of bools; True means that the
        leaf may be folded, False keeps it dense. See :func:`flora_jax.not_embeddings`.
      min_dim_size: smallest side of a matrix; 128 as in Adafactor.
      max_aspect_ratio: largest ratio of its sides; 16 as in the paper's accumulation.
      weight_dimension_numbers: None, or which axes form the matrix, as in optax: a
        ``MuonDimensionNumbers`` or ``GaLoreDimensionNumbers`` for all leaves, a tree of
        them (None leaves a leaf dense), or a callable from params to such a tree. Axes
        that are not named are batch axes.
      keep_logical_axes: whether the axis that holds the rank keeps a logical name of
        flax's metadata that no active rule maps to the mesh. False drops the name,
        which leaves that axis unsharded; True keeps it, for rules that are applied
        after ``init``. Names that active rules map are kept even without a mesh. The
        rank must be divisible by the shards of a name that is kept.
      layer_shards: None, or a tree of the numbers of shards of each leaf's first batch
        axis, 0 if unknown; :meth:`with_metadata` fills it in. On a mesh a step holds
        the full sketch of this many layers at a time, or of more if unknown.

    Trees are looked up by normalized path: ``jax.tree_util.keystr(path, simple=True,
    separator="/")`` without the ``/value`` that NNX Variables and Linen boxes add. They
    have an entry for every leaf, or for a pattern of its path such as ``"*/kernel"``.

    Raises:
      TypeError: for arguments of a wrong type.
      ValueError: for arguments out of range.
    """

    mask: LeafMask = None
    min_dim_size: int = 128
    max_aspect_ratio: float = 16
    weight_dimension_numbers: Any = None
    keep_logical_axes: bool = False
    layer_shards: Any = None

    def __post_init__(self) -> None:
        """Raises on bad arguments, and makes trees hashable."""
        if callable(self.mask):
            _validation.check_leaf_rule("mask", self.mask)
        elif is_scalar(self.mask):
            raise TypeError(
                "`mask` must be a callable of (path, shape) or a tree of bools, got"
                f" mask={self.mask!r}; use None to sketch every leaf that folds"
            )
        _validation.check_positive_int(
            "min_dim_size", self.min_dim_size, "use 1 to sketch every matrix"
        )
        _validation.check_number(
            "max_aspect_ratio", self.max_aspect_ratio, 1, None, "use 16, or math.inf"
        )
        _validation.check_bool("keep_logical_axes", self.keep_logical_axes)
        numbers = self.weight_dimension_numbers
        if not callable(numbers) or _is_dimension_numbers(numbers):
            if is_scalar(numbers):
                numbers = _hashable_numbers(numbers)
            numbers = by_path(numbers, _hashable_numbers)
        object.__setattr__(self, "mask", by_path(self.mask, bool))
        if callable(self.layer_shards) or is_scalar(self.layer_shards):
            raise TypeError(
                "`layer_shards` must be a tree of ints, got"
                f" layer_shards={self.layer_shards!r}; use sketch.with_metadata(params)"
            )
        shards = by_path(self.layer_shards, _shards)
        object.__setattr__(self, "layer_shards", shards)
        object.__setattr__(self, "weight_dimension_numbers", numbers)

    def plan(self, tree: PyTree) -> tuple[LeafPlan, ...]:
        """Plans of all leaves, in the order of ``jax.tree.leaves``.

        Args:
          tree: parameters, gradients or their ShapeDtypeStructs.

        Returns:
          One plan per array leaf.

        Raises:
          TypeError: for a leaf that is not an array of a real floating dtype.
          ValueError: for a rank, mask or dimension numbers that do not fit a leaf.
        """
        numbers = self.weight_dimension_numbers
        if callable(numbers) and not _is_dimension_numbers(numbers):
            # optax.tree.map_params calls init with a placeholder without leaves.
            numbers = numbers(tree) if jax.tree.leaves(tree) else None
            numbers = by_path(numbers, _hashable_numbers)
        known, plans = self._known, []
        for path, leaf in named_leaves(tree):
            shape, own = _shape(path, leaf), numbers
            if isinstance(numbers, ByPath):
                own = numbers.find("weight_dimension_numbers", path, shape)
                # None in the tree keeps a leaf dense; None for the tree is the rule.
                own = False if own is None else own
            key = (path, shape, own)
            if key not in known:
                plan, shards = self._plan(path, shape, self._fold(*key)), 0
                if self.layer_shards is not None:
                    shards = self.layer_shards.find("layer_shards", path, shape)
                known[key] = dataclasses.replace(plan, layer_shards=shards)
            plans.append(known[key])
        return tuple(plans)

    @functools.cached_property
    def _known(self) -> dict[Any, LeafPlan]:
        """Plans that were made before: init and update ask for the same."""
        return {}

    def _plan(self, path: str, shape: Shape, fold: Fold) -> LeafPlan:
        """The plan of a leaf with a fold; subclasses add what they do with it."""
        return LeafPlan.of(path, shape, fold, keep_logical_axes=self.keep_logical_axes)

    def with_metadata(self, params: PyTree) -> Self:
        """These rules, with what is known of the parameters' axes.

        Flax's metadata names axes along which layers or experts are stacked, and axes
        of attention heads, which are part of a matrix: by the logical names of flax's
        examples and MaxText, by partition name, or by MaxText's ``param_scan_axis``.
        Metadata, or the sharding of an array, tells whether a stacked axis is sharded:
        where it is not, a step on a mesh goes layer by layer, and takes less memory.
        Both are read here, once, as the updates of ``nnx.Optimizer`` do not have them.

        Args:
          params: what ``init`` will be given, an NNX state or Linen variables in their
            boxes, or arrays; shapes, with their shardings, suffice.

        Returns:
          A copy with ``weight_dimension_numbers`` and ``layer_shards``.

        Raises:
          ValueError: if the rules have ``weight_dimension_numbers`` already.

        Example:
          >>> import flora_jax as fj
          >>> from flax import nnx
          >>> import jax.numpy as jnp
          >>> kernel = nnx.Param(
          ...     jnp.zeros((256, 4, 512)), out_sharding=("embed", "layers", "mlp"),
          ...     eager_sharding=False)
          >>> params = nnx.State({"up": kernel})
          >>> sketch = fj.Sketch(64).with_metadata(params)
          >>> plan, = sketch.plan(params)
          >>> plan.batch_axes, plan.state_shape
          ((1,), (64, 4, 512))
        """
        if self.weight_dimension_numbers is not None:
            raise ValueError(
                "`weight_dimension_numbers` must be None for with_metadata, got"
                f" {self.weight_dimension_numbers}; leave one of them out"
            )
        nodes = boxes.named_nodes(params)
        entries = []
        for path, box in nodes:
            (leaf,) = jax.tree.leaves(box)
            names = boxes.axis_roles(box)
            entries.append((path, self._numbers(_shape(path, leaf), *names)))
        numbers = ByPath(tuple(entries))
        rules = dataclasses.replace(self, weight_dimension_numbers=numbers)
        shards = [
            (
                path,
                boxes.known_shards(box, plan.batch_axes[0]) if plan.batch_axes else 0,
            )
            for (path, box), plan in zip(nodes, rules.plan(params), strict=True)
        ]
        return dataclasses.replace(rules, layer_shards=ByPath(tuple(shards)))

    def check_stacked(
        self, name: str, plans: Sequence[LeafPlan], params: PyTree
    ) -> None:
        """Raises if a fold merges an axis that is stacked according to its metadata.

        Args:
          name: the transformation.
          plans: of all leaves.
          params: the parameters, in their boxes.

        Raises:
          ValueError: naming the leaf; not for folds that the user has given.
        """
        if self.weight_dimension_numbers is not None:
            return
        for plan, (_, node) in zip(plans, boxes.named_nodes(params), strict=True):
            # What has two axes is no stack of matrices.
            stacked, _ = boxes.axis_roles(node) if len(plan.shape) > 2 else ((), ())
            if merged := {*stacked} & {*plan.row_axes, *plan.column_axes}:
                raise ValueError(
                    f"leaf {plan.path!r} of shape {plan.shape} is stacked along axis"
                    f" {min(merged)} by its metadata, but {name} would fold it into a"
                    f" {plan.rows}x{plan.columns} matrix; pass"
                    " sketch.with_metadata(params), or `weight_dimension_numbers`"
                )

    def _numbers(self, shape: Shape, stacked: Axes, heads: Axes) -> Any:
        """Dimension numbers of the leaf's fold; of all its axes if it stays dense."""
        limits = self.min_dim_size, self.max_aspect_ratio
        fold = fold_axes(shape, *limits, stacked, heads)
        if isinstance(fold, str):
            # The rule refuses these axes again, and so gives its reason.
            fold = fold_axes(shape, 0, math.inf, stacked, tuple(range(len(shape))))
        if isinstance(fold, str):
            return None
        return MuonDimensionNumbers(fold[1], fold[2])

    def _fold(self, path: str, shape: Shape, numbers: Any) -> Fold:
        """The fold by the rule, or by the user's dimension numbers."""
        if len(shape) > 1 and math.prod(shape) == 1:
            return "it has a single element"
        mask = self.mask
        if isinstance(mask, ByPath):
            mask = functools.partial(mask.find, "mask")
        if mask is not None and not mask(path, shape):
            return "the mask leaves it out"
        if numbers is None:
            least, largest = self.min_dim_size, self.max_aspect_ratio
            return fold_axes(shape, least, largest)
        if len(shape) < 2:
            return "it has fewer than two axes"
        if numbers is False:
            return "weight_dimension_numbers leave it out"
        rows = _axes(path, shape, numbers.reduction_axis)
        columns = _axes(path, shape, numbers.output_axis)
        if not rows or not columns or len({*rows, *columns}) < len(rows + columns):
            raise ValueError(
                f"`weight_dimension_numbers` of leaf {path!r} must name disjoint,"
                f" non-empty axes, got {numbers} for shape {shape}; name each axis once"
            )
        n, m = (math.prod(shape[i] for i in axes) for axes in (rows, columns))
        batch = tuple(i for i in range(len(shape)) if i not in rows + columns)
        reason = matrix_reason(n, m, self.min_dim_size, self.max_aspect_ratio)
        return reason or (batch, rows, columns)


def _shards(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(
            "`layer_shards` must be numbers of shards, 0 for unknown, got"
            f" {value!r}; use sketch.with_metadata(params)"
        )
    return value


def _is_dimension_numbers(value: Any) -> bool:
    return hasattr(value, "reduction_axis") and hasattr(value, "output_axis")


def _hashable_numbers(numbers: Any) -> Any:
    """Dimension numbers whose axes are ints and tuples; None passes."""
    if numbers is None:
        return None
    if not _is_dimension_numbers(numbers):
        raise TypeError(
            "`weight_dimension_numbers` must be dimension numbers, a tree of them or a"
            f" callable, got {numbers!r}; use optax.contrib.MuonDimensionNumbers"
        )
    axes = numbers.reduction_axis, numbers.output_axis
    return type(numbers)(*(x if isinstance(x, int) else tuple(x) for x in axes))


def _axes(path: str, shape: Shape, axes: Any) -> Axes:
    """Axes as a tuple of non-negative ints."""
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    if any(not -len(shape) <= i < len(shape) for i in axes):
        raise ValueError(
            f"`weight_dimension_numbers` of leaf {path!r} name axes {axes}, got shape"
            f" {shape}; name axes that the leaf has"
        )
    return tuple(i % len(shape) for i in axes)


def _shape(path: str, leaf: Any) -> Shape:
    """The shape of a leaf, if it is one that optimizers can update."""
    if not hasattr(leaf, "dtype") and not isinstance(leaf, int | float | complex):
        raise TypeError(
            f"leaf {path!r} must be an array, got {leaf!r}; pass the arrays of a model"
            " alone, for example equinox.filter(model, equinox.is_inexact_array)"
        )
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"leaf {path!r} must have a real floating dtype, got {dtype}; leave it out"
            " with optax.masked, or split complex parameters with"
            " optax.contrib.split_real_and_imaginary"
        )
    return jnp.shape(leaf)


def embeddings(path: str, shape: Shape) -> bool:
    """Whether a leaf belongs to an embedding or an output head, by its path.

    True if a part of the path, between slashes or dots, is ``embed``, ``embedder``,
    ``embedding``, ``embeddings``, ``embed_tokens``, ``input_embedding``, ``lm_head``,
    ``logits_dense``, ``position_embedder``, ``pos_embedding``,
    ``relative_attention_bias``, ``shared``, ``token_embedder``, ``wpe`` or ``wte``.

    Args:
      path: normalized path of the leaf, for example ``"h/0/attn/c_attn/kernel"``.
      shape: its shape, which is not looked at.
    """
    del shape
    return _EMBEDDING.search(path) is not None


def not_embeddings(path: str, shape: Shape) -> bool:
    """Whether a leaf is neither an embedding nor an output head: the usual ``mask``.

    The gradient of an embedding is sparse by rows, unlike a matrix product's. See
    :func:`embeddings` for the names.

    Example:
      >>> import flora_jax as fj
      >>> fj.not_embeddings("wte/embedding", (50257, 768))
      False
      >>> sketch = fj.Sketch(256, mask=fj.not_embeddings)
    """
    return not embeddings(path, shape)
