"""Moments of any transformation, kept in codes of 8 or 16 bits."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax

from flora_jax import _validation as check
from flora_jax._typing import PyTree, Shape
from flora_jax.leaves import trees
from flora_jax.leaves.in_place import InPlace
from flora_jax.leaves.moments import KINDS, SECOND, find_moments, replace_moments
from flora_jax.leaves.paths import named_leaves
from flora_jax.leaves.rules import LeafRules
from flora_jax.leaves.spec import make_spec
from flora_jax.quantization import codes as coding
from flora_jax.sketching.sketcher import gradient_shapes

_NAME = "quantize_state"
# 2³² divided by the golden ratio; its multiples modulo 2³² are a low-discrepancy
# sequence.
_STRIDE = 2654435769
# Path of each leaf of moments, and whether its code is signed.
Leaves: TypeAlias = list[tuple[str, bool]]


class QuantizedState(NamedTuple):
    """State of :func:`quantize_state`.

    Attributes:
      count: number of updates so far, int32.
      spec: what the state means, for :func:`flora_jax.verify_state`.
      inner: state of the inner transformation, with codes in place of the moments.
      scales: for each tree of moments that is coded, in the order of ``inner``, a tree
        of scales, one array per parameter leaf.
    """

    count: Any
    spec: jax.Array
    inner: Any
    scales: tuple[Any, ...]


def quantize_state(
    inner: optax.GradientTransformation,
    dtype: Any = "int8",
    *,
    min_size: int = 4096,
    fields: Collection[str] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the moments of a transformation in codes of 8 or 16 bits.

    Each update decodes the moments, runs ``inner`` and encodes them again. Moments are
    the trees of a state whose fields have the names that optax gives them: ``mu``,
    ``ema``, ``momentum``, ``trace``, ``acc_grads`` and ``error`` get a signed code,
    ``nu`` an unsigned one; sketches under these names as well. Their leaves have the
    paths and numbers of axes of the parameters; a field of such a name that holds
    anything else stays as it is. The elements of a row, along the last axis of a leaf,
    share a scale; see :func:`flora_jax.quantization.codes.encode` for the codes and
    their errors. Leaves of fewer than ``min_size`` elements, or of fewer than two axes
    longer than 1, stay as they are.

    First moments are rounded to the nearest code. Most changes of second moments are
    smaller than half a step and would be lost: float32 ones are rounded up above a
    threshold that follows a low-discrepancy sequence, multiples of the golden ratio,
    so that rounding is unbiased over a few updates. The decay of a whole row is in its
    scale. Quantize inside an accumulation, not around it: micro-steps count as updates.
    Rows with an infinite or undefined entry become NaN.

    Memory: one byte per element of a moment (two for bfloat16) and one scale of the
    moment's dtype per row: 4/m bytes per element if rows have m. If m is under 32, rows
    run along the longest axis instead. On a mesh that shards the rows, each device
    keeps the scales of all of them, and m is its share of a row.

    Args:
      inner: the transformation, for example optax.adam(1e-3); also one whose state is
        sketched already.
      dtype: ``"int8"``, ``"float8_e4m3fn"`` or ``"bfloat16"``.
      min_size: fewest elements of a leaf that is coded; 4096 as in GaLore's 8-bit
        moments.
      fields: names of the fields to code, for example ``("mu",)``; None for all.

    Returns:
      The gradient transformation. It passes parameters and extra arguments on to
      ``inner``; updates have the dtype of the gradients.

    Raises:
      TypeError: for arguments of a wrong type; from init, for leaves that are not
        arrays and for moments of integers.
      ValueError: for arguments out of range; from init, if there are no moments; from
        update, if the state was made under other settings.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import flora_jax as fj
      >>> params = {"w": jnp.ones((256, 512))}
      >>> state = fj.quantize_state(optax.adam(1e-3)).init(params)
      >>> adam = state.inner[0]
      >>> adam.mu["w"].dtype.name, adam.nu["w"].dtype.name
      ('int8', 'uint8')
      >>> state.scales[0]["w"].shape
      (256, 1)

    References:
      Dettmers et al., `8-bit Optimizers via Block-wise Quantization
      <https://arxiv.org/abs/2110.02861>`_, 2021
    """
    codec = MomentCodec(
        check_code("dtype", dtype),
        check.check_positive_int("min_size", min_size, "use 1 to code every matrix"),
        _check_fields(fields),
    )
    inner = check.check_transformation("inner", inner)

    def init_fn(params: PyTree) -> QuantizedState:
        _check_arrays(params)
        inner_state = inner.init(params)
        names, moments = codec.find(inner_state, params)
        _check_moments(codec, names, moments)
        scales = [_empty_scales(codec, tree) for tree in moments]
        named = _named_leaves(names, moments)
        codes, scales = _encode(codec, named, _hidden(moments), moments, scales)
        return QuantizedState(
            count=jnp.zeros([], jnp.int32),
            spec=make_spec(_NAME, np.zeros(2, np.uint32), **codec._asdict()),
            inner=codec.replace(inner_state, params, codes),
            scales=tuple(scales),
        )

    def update_fn(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[Any, QuantizedState]:
        like = gradient_shapes(updates)
        names, codes = codec.find(state.inner, like)
        named = _named_leaves(names, codes)
        _check_coded(codec, names, named, codes, state.scales)
        decoded = _decode(codec, named, codes, state.scales)
        new_updates, new_inner = inner.update(
            updates, codec.replace(state.inner, like, decoded), params, **extra_args
        )
        _, moments = codec.find(new_inner, like)
        threshold = state.count.astype(jnp.uint32) * np.uint32(_STRIDE)
        codes, scales = _encode(codec, named, moments, codes, state.scales, threshold)
        if not isinstance(new_updates, InPlace):
            new_updates = optax.tree.cast_like(new_updates, like)
        return new_updates, QuantizedState(
            count=optax.safe_increment(state.count),
            spec=state.spec,
            inner=codec.replace(new_inner, like, codes),
            scales=tuple(scales),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class MomentCodec(NamedTuple):
    """The settings that decide which moments are coded, and what the codes mean."""

    dtype: str
    min_size: int
    fields: tuple[str, ...] | None

    def find(self, state: Any, params: PyTree) -> tuple[list[str], list[PyTree]]:
        """Field names and trees of the moments in a state that are to be coded."""
        groups = find_moments(state, params, self.fields or KINDS)
        pairs = [pair for group in groups for pair in group.items()]
        return [name for name, _ in pairs], [tree for _, tree in pairs]

    def replace(self, state: Any, params: PyTree, moments: list[PyTree]) -> Any:
        """The state with other trees in the places that :meth:`find` finds."""
        return replace_moments(state, params, moments, self.fields or KINDS)

    def is_exact(self, shape: Shape, dtype: Any) -> bool:
        """Whether a leaf of moments stays as it is."""
        matrix = sum(n > 1 for n in shape) >= 2 and math.prod(shape) >= self.min_size
        return not (matrix and jnp.issubdtype(dtype, jnp.floating))

    def types(self, signed: bool, shape: Shape, dtype: Any) -> tuple[Any, Shape]:
        """Dtype of the codes and shape of the scales of a leaf of moments."""
        if self.is_exact(shape, dtype):
            return dtype, (1,) * len(shape)
        scales = coding.scale_shape(shape, self.dtype)
        return coding.code_dtype(self.dtype, signed), scales


def _empty_scales(codec: MomentCodec, tree: Any) -> Any:
    """Zeros in place of a tree's scales, in its boxes, with its sharding.

    They have the dtype of the moment, which holds its largest entry exactly. It also
    tells an update what dtype the inner transformation gave to its state.
    """
    leaves = jax.tree.leaves(tree)
    # The shape does not depend on the sign.
    shapes = [codec.types(True, x.shape, x.dtype)[1] for x in leaves]
    zeros = trees.zeros_tree(tree, None, shapes, jnp.float32)
    own = map(trees.cast_like, jax.tree.leaves(zeros), leaves)
    return trees.rebuild(zeros, list(own))


def _hidden(moments: list[Any]) -> list[Any]:
    """The moments, of which XLA does not know that they are constant zeros.

    It would look for the largest of these while it compiles, for minutes.
    """
    zero = jax.lax.optimization_barrier(jnp.float32(0))

    def hide(x: jax.Array) -> jax.Array:
        return x + zero.astype(x.dtype) if isinstance(x, jax.core.Tracer) else x

    return jax.tree.map(hide, moments)


def _encode(
    codec: MomentCodec,
    named: Leaves,
    moments: list[Any],
    codes: list[Any],
    scales: Sequence[Any],
    threshold: jax.Array | None = None,
) -> tuple[list[Any], Sequence[Any]]:
    """Codes and scales of trees of moments.

    Args:
      codec: the settings.
      named: path of each leaf, and whether its code is signed.
      moments: the trees.
      codes: trees of codes, or of moments, whose structure and sharding to take.
      scales: trees of scales, for the same; their dtype is the moments'.
      threshold: of second moments; None to round to the nearest.

    Returns:
      The trees of codes and those of scales.
    """

    def run(moments: Any, scales: Any, threshold: Any) -> list[Any]:
        coded = []
        for (_, signed), x, scale in zip(named, moments, scales, strict=True):
            x = x.astype(scale.dtype)
            if not codec.is_exact(x.shape, x.dtype):
                own = None if signed else threshold
                x, scale = coding.encode(x, codec.dtype, signed, own)
            coded.append((x, scale))
        return [x for x, _ in coded] + [scale for _, scale in coded]

    like, old = jax.tree.leaves((codes, scales)), jax.tree.leaves(scales)
    new = trees.run_sharded(run, like, jax.tree.leaves(moments), old, threshold)
    return trees.rebuild((codes, scales), list(map(_place, new, like)))


def _decode(
    codec: MomentCodec, named: Leaves, codes: list[Any], scales: Sequence[Any]
) -> list[Any]:
    """The trees of moments."""

    def run(codes: Any, scales: Any) -> list[Any]:
        return [
            x
            if codec.is_exact(x.shape, scale.dtype)
            else coding.decode(x, scale, codec.dtype, signed)
            for (_, signed), x, scale in zip(named, codes, scales, strict=True)
        ]

    old = jax.tree.leaves(codes)
    new = trees.run_sharded(run, old, old, jax.tree.leaves(scales))
    return trees.rebuild(codes, new)


def _named_leaves(names: Sequence[str], moments: Sequence[Any]) -> Leaves:
    """A path that no other leaf has, and whether the code has signs, of all leaves."""
    return [
        (f"{i}/{name}/{path}", KINDS[name] != SECOND)
        for i, (name, tree) in enumerate(zip(names, moments, strict=True))
        for path, _ in named_leaves(tree)
    ]


def _place(new: Any, old: Any) -> Any:
    """A concrete array on the mesh where the old one is."""
    traced = isinstance(new, jax.core.Tracer) or isinstance(old, jax.core.Tracer)
    if traced or not isinstance(old, jax.Array):
        return new
    on_mesh = isinstance(old.sharding, jax.NamedSharding)
    return jax.device_put(new, old.sharding) if on_mesh else new


def _check_coded(
    codec: MomentCodec, names: Sequence[str], named: Leaves, codes: Any, scales: Any
) -> None:
    """Raises if codes and scales are not those of the settings; by static facts."""
    counts = [[len(jax.tree.leaves(tree)) for tree in x] for x in (codes, scales)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"`state` of {_NAME} must have scales for each array of {names}, got"
            f" {counts[1]} arrays in its trees of scales for {counts[0]}; it was made"
            " with other `fields` or parameters: init again, or restore the settings"
        )
    coded = map(jax.tree.leaves, (codes, scales))
    for (path, signed), x, scale in zip(named, *coded, strict=True):
        expected = codec.types(signed, x.shape, scale.dtype)
        if (x.dtype, scale.shape) != expected:
            raise ValueError(
                f"`state` of {_NAME} must have codes of dtype {expected[0]} and scales"
                f" of shape {expected[1]} at {path!r}, got {x.dtype} and"
                f" {scale.shape}; it was made with other settings than {codec}, or"
                " cast: init again, or restore it"
            )


def check_code(name: str, value: Any) -> str:
    """The name of a code's dtype; raises ValueError for other dtypes.

    Args:
      name: the argument's name.
      value: what was given for it.
    """
    try:
        dtype = jnp.dtype(value).name
    except TypeError:
        dtype = value  # Not a dtype; the message shows what was given.
    check.check_choice(name, dtype, coding.CODES)
    return dtype


def _check_fields(fields: Any) -> tuple[str, ...] | None:
    if fields is None:
        return None
    if isinstance(fields, str) or not isinstance(fields, Collection):
        raise TypeError(
            f"`fields` must be a collection of names, got fields={fields!r}; pass a"
            " tuple, for example ('mu',)"
        )
    if not fields or not set(fields) <= set(KINDS):
        raise ValueError(
            f"`fields` must name some of {', '.join(KINDS)}, got fields={fields!r}; use"
            " None for all that the state has"
        )
    return tuple(sorted(fields))


def _check_arrays(params: PyTree) -> None:
    """Raises as other transformations do for leaves that are not arrays.

    Unlike these it accepts integers and complex numbers.
    """

    def keep_others(leaf: Any) -> Any:
        numeric = hasattr(leaf, "dtype") or isinstance(leaf, int | float | complex)
        return None if numeric else leaf

    LeafRules().plan(jax.tree.map(keep_others, params))


def _check_moments(codec: MomentCodec, names: list[str], moments: list[Any]) -> None:
    """Raises without moments, or for integers; complex ones stay exact."""
    missing = set(codec.fields or ()) - set(names)
    if missing or not names:
        raise ValueError(
            "the state of `inner` must have moments to code, got none in fields named"
            f" {', '.join(sorted(missing or KINDS))}; use `inner` alone, or name other"
            " `fields`"
        )
    for name, tree in zip(names, moments, strict=True):
        for path, leaf in named_leaves(tree):
            if not jnp.issubdtype(leaf.dtype, jnp.inexact):
                raise TypeError(
                    f"`inner` must keep floating or complex moments, got {leaf.dtype}"
                    f" in {name!r} for leaf {path!r}; leave it out with optax.masked"
                )
