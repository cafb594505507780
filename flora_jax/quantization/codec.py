"""Trees of moments to trees of codes and scales, and back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp

from flora_jax._typing import PyTree
from flora_jax.leaves.moments import KINDS, SECOND, find_moments, map_moments
from flora_jax.leaves.paths import named_leaves
from flora_jax.leaves.trees import rebuild, run_sharded, zeros_tree
from flora_jax.quantization.blockwise import code_dtype, decode, encode, scale_shape
from flora_jax.random.bits import bits
from flora_jax.random.keys import leaf_keys

NAME = "quantize_state"


class MomentCodec(NamedTuple):
    """The settings that decide which moments are coded, and what the codes mean."""

    dtype: str
    block: int
    min_size: int
    fields: tuple[str, ...] | None

    def find(self, state: Any, params: PyTree) -> tuple[list[str], list[PyTree]]:
        """Field names and trees of the moments in a state that are to be coded."""
        groups = find_moments(state, params, self.fields or tuple(KINDS))
        pairs = [pair for group in groups for pair in group.items()]
        return [name for name, _ in pairs], [tree for _, tree in pairs]

    def replace(self, state: Any, params: PyTree, trees: Sequence[PyTree]) -> Any:
        """The state with other trees in the places that :meth:`find` finds."""
        rest = iter(trees)
        return map_moments(
            lambda group: {name: next(rest) for name in group},
            state,
            params,
            self.fields or tuple(KINDS),
        )

    def is_exact(self, shape: tuple[int, ...], dtype: Any) -> bool:
        """Whether a leaf of moments stays as it is."""
        matrix = sum(n > 1 for n in shape) >= 2 and math.prod(shape) >= self.min_size
        return not (matrix and jnp.issubdtype(dtype, jnp.floating))

    def types(
        self, name: str, shape: tuple[int, ...], dtype: Any
    ) -> tuple[Any, tuple[int, ...]]:
        """Dtype of the codes and shape of the scales of a leaf of moments."""
        if self.is_exact(shape, dtype):
            return dtype, (1,) * len(shape)
        scales = scale_shape(shape, self.dtype, self.block)
        return code_dtype(self.dtype, KINDS[name] != SECOND), scales


def empty_scales(codec: MomentCodec, tree: Any) -> Any:
    """Zeros in place of a tree's scales, in its boxes, with its sharding.

    They have the dtype of the moment, which holds its largest entry exactly. It also
    tells an update what dtype the inner transformation gave to its state.
    """
    leaves = jax.tree.leaves(tree)
    # The shape does not depend on the field.
    shapes = [codec.types("mu", x.shape, x.dtype)[1] for x in leaves]
    zeros = zeros_tree(tree, shapes, jnp.float32)
    pairs = zip(jax.tree.leaves(zeros), leaves, strict=True)
    return rebuild(zeros, [zero.astype(x.dtype) for zero, x in pairs])


def encode_moments(
    codec: MomentCodec,
    names: Sequence[str],
    moments: list[Any],
    codes: list[Any],
    scales: list[Any],
    rounding: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[list[Any], list[Any]]:
    """Codes and scales of trees of moments.

    Args:
      codec: the settings.
      names: the field of each tree.
      moments: the trees.
      codes: trees of codes, or of moments, whose structure and sharding to take.
      scales: trees of scales, for the same; their dtype is the moments'.
      rounding: root key and count of a random rounding; None to round to the nearest.

    Returns:
      The trees of codes and those of scales.
    """
    paths = _paths(names, codes)

    def run(leaves: Any, old: Any, rounding: Any) -> tuple[list[Any], list[Any]]:
        keys = [None] * len(leaves)
        if rounding is not None:
            keys = list(
                leaf_keys(rounding[0], NAME, [p for _, p in paths], rounding[1])
            )
        coded = [
            _encode_leaf(codec, name, x.astype(scale.dtype), scale, key)
            for (name, _), x, scale, key in zip(paths, leaves, old, keys, strict=True)
        ]
        return [pair[0] for pair in coded], [pair[1] for pair in coded]

    like = jax.tree.leaves(codes), jax.tree.leaves(scales)
    new = run_sharded(run, like, jax.tree.leaves(moments), like[1], rounding)
    return (
        rebuild(codes, _place(new[0], like[0])),
        rebuild(scales, _place(new[1], like[1])),
    )


def _encode_leaf(
    codec: MomentCodec, name: str, x: jax.Array, scale: jax.Array, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Codes and scales of one leaf, or the leaf and its unused scale."""
    if codec.is_exact(x.shape, x.dtype):
        return x, scale
    words = None if key is None else bits(key, x.shape, 0)
    return encode(x, codec.dtype, codec.block, KINDS[name] != SECOND, words)


def decode_moments(
    codec: MomentCodec, names: Sequence[str], codes: list[Any], scales: list[Any]
) -> list[Any]:
    """The trees of moments; raises if codes or scales were made otherwise."""
    _check_coded(codec, names, codes, scales)
    paths = _paths(names, codes)

    def run(codes: Any, scales: Any) -> list[Any]:
        return [
            x
            if codec.is_exact(x.shape, s.dtype)
            else decode(x, s, codec.dtype, codec.block, KINDS[name] != SECOND)
            for (name, _), x, s in zip(paths, codes, scales, strict=True)
        ]

    leaves = jax.tree.leaves(codes)
    return rebuild(codes, run_sharded(run, leaves, leaves, jax.tree.leaves(scales)))


def _paths(names: Sequence[str], trees: Sequence[Any]) -> list[tuple[str, str]]:
    """(field, path that no other leaf has) of all leaves of the trees."""
    return [
        (name, f"{i}/{name}/{path}")
        for i, (name, tree) in enumerate(zip(names, trees, strict=True))
        for path, _ in named_leaves(tree)
    ]


def _place(new: Sequence[Any], old: Sequence[Any]) -> list[Any]:
    """Concrete arrays on the mesh where the old ones are."""
    return [
        jax.device_put(x, y.sharding)
        if not isinstance(x, jax.core.Tracer)
        and isinstance(y, jax.Array)
        and not isinstance(y, jax.core.Tracer)
        and isinstance(y.sharding, jax.NamedSharding)
        else x
        for x, y in zip(new, old, strict=True)
    ]


def _check_coded(
    codec: MomentCodec,
    names: Sequence[str],
    codes: Sequence[Any],
    scales: Sequence[Any],
) -> None:
    """Raises if codes and scales are not those of the settings; by static facts."""
    counts = [[len(jax.tree.leaves(tree)) for tree in x] for x in (codes, scales)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"`state` of {NAME} must have scales for each array of {names}, got"
            f" {counts[1]} arrays in its trees of scales for {counts[0]}; it was made"
            " with other `fields` or parameters: init again, or restore the settings"
        )
    leaves = zip(jax.tree.leaves(codes), jax.tree.leaves(scales), strict=True)
    for (name, path), (x, scale) in zip(_paths(names, codes), leaves, strict=True):
        expected = codec.types(name, x.shape, scale.dtype)
        if (x.dtype, scale.shape) != expected:
            raise ValueError(
                f"`state` of {NAME} must have codes of dtype {expected[0]} and scales"
                f" of shape {expected[1]} at {path!r}, got {x.dtype} and"
                f" {scale.shape}; it was made with other settings than {codec}, or"
                " cast: init again, or restore it"
            )
