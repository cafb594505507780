"""Moments of any transformation, kept in codes of 8 or 16 bits."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flora_jax import _validation as check
from flora_jax._typing import KeyLike, PyTree
from flora_jax.leaves.moments import KINDS
from flora_jax.leaves.paths import named_leaves
from flora_jax.leaves.spec import make_spec
from flora_jax.quantization.blockwise import CODES
from flora_jax.quantization.codec import (
    NAME,
    MomentCodec,
    decode_moments,
    empty_scales,
    encode_moments,
)
from flora_jax.random.keys import check_state_key, raw_key
from flora_jax.sketching.sketched_gradients import gradient_shapes


class QuantizedState(NamedTuple):
    """State of :func:`quantize_state`.

    Attributes:
      count: number of updates so far, int32.
      key: root key data, uint32 of shape (2,); it never changes.
      spec: what the state means, for :func:`flora_jax.verify_state`.
      inner: state of the inner transformation, with codes in place of the moments.
      scales: for each tree of moments that is coded, in the order of ``inner``, a tree
        of scales, one array per parameter leaf.
    """

    count: Any
    key: jax.Array
    spec: jax.Array
    inner: Any
    scales: tuple[Any, ...]


def quantize_state(
    inner: optax.GradientTransformation,
    dtype: Any = "int8",
    *,
    block: int = 256,
    min_size: int = 4096,
    stochastic_rounding: bool = False,
    fields: Collection[str] | None = None,
    key: KeyLike = 0,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the moments of a transformation in codes of 8 or 16 bits.

    Each update decodes the moments, runs ``inner`` and encodes them again. Moments are
    the trees of a state whose fields have the names that optax gives them: ``mu``,
    ``ema``, ``momentum``, ``trace``, ``acc_grads`` and ``error`` get a signed code,
    ``nu`` an unsigned one; sketches under these names as well. Their leaves have the
    paths and numbers of axes of the parameters; a field of such a name that holds
    anything else stays as it is. Elements share a scale in blocks along the longest
    axis of a leaf; see :func:`flora_jax.quantization.encode` for the codes and their
    errors. Leaves of fewer than ``min_size`` elements, or of fewer than two axes longer
    than 1, stay as they are.

    A change of a moment is kept only if it is above half a step, up to 0.8% of the
    block's largest entry for int8. The decay of a whole block is in its scale and
    always kept. With b2 = 0.999, a second moment that grows by less per update than
    half a step to the next code stays behind, unless ``stochastic_rounding`` keeps it
    right in the mean. Blocks with an infinite or undefined entry become NaN.

    Memory: one byte per element of a moment (two for bfloat16) and one scale of the
    moment's dtype per block: 4/256 bytes per element where ``block`` divides the
    longest axis. A block is not longer than that axis.

    Args:
      inner: the transformation, for example optax.adam(1e-3); also one whose state is
        sketched already.
      dtype: ``"int8"``, ``"float8_e4m3fn"`` or ``"bfloat16"``.
      block: elements per scale; 256 as in GaLore's 8-bit moments. Choose one that
        divides the length of a shard.
      min_size: fewest elements of a leaf that is coded; 4096 as there.
      stochastic_rounding: round at random to one of the two nearest values, so that
        the mean is exact, and not to the nearest.
      fields: names of the fields to code, for example ``("mu",)``; None for all.
      key: int seed, typed threefry2x32 key, or its key data, for stochastic rounding;
        it is in the state without that, too.

    Returns:
      The gradient transformation. It passes parameters and extra arguments on to
      ``inner``; updates have the dtype of the gradients.

    Raises:
      TypeError: for arguments of a wrong type; from init, for moments of integers;
        from update, if the key was cast.
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
      (256, 2)

    References:
      Dettmers et al., `8-bit Optimizers via Block-wise Quantization
      <https://arxiv.org/abs/2110.02861>`_, 2021
    """
    codec = MomentCodec(
        _check_code(dtype),
        check.check_positive_int("block", block, "256 elements per scale are usual"),
        check.check_positive_int("min_size", min_size, "use 1 to code every matrix"),
        None if fields is None else _check_fields(fields),
    )
    check.check_bool("stochastic_rounding", stochastic_rounding)
    root = raw_key(key)
    inner = check.check_transformation("inner", inner)

    def init_fn(params: PyTree) -> QuantizedState:
        inner_state = inner.init(params)
        names, moments = codec.find(inner_state, params)
        _check_found(names, codec.fields)
        _check_real_or_complex(names, moments)
        scales = [empty_scales(codec, tree) for tree in moments]
        codes, scales = encode_moments(codec, names, moments, moments, scales)
        return QuantizedState(
            count=jnp.zeros([], jnp.int32),
            key=jnp.array(root),
            spec=make_spec(NAME, root, **codec._asdict()),
            inner=codec.replace(inner_state, params, codes),
            scales=tuple(scales),
        )

    def update_fn(
        updates: PyTree, state: Any, params: PyTree = None, **extra_args: Any
    ) -> tuple[Any, QuantizedState]:
        check_state_key(NAME, state.key)
        like = gradient_shapes(updates)
        names, codes = codec.find(state.inner, like)
        scales = list(state.scales)
        decoded = decode_moments(codec, names, codes, scales)
        new_updates, new_inner = inner.update(
            updates, codec.replace(state.inner, like, decoded), params, **extra_args
        )
        _, moments = codec.find(new_inner, like)
        rounding = (state.key, state.count) if stochastic_rounding else None
        codes, scales = encode_moments(codec, names, moments, codes, scales, rounding)
        return optax.tree.cast_like(new_updates, like), QuantizedState(
            count=optax.safe_increment(state.count),
            key=state.key,
            spec=state.spec,
            inner=codec.replace(new_inner, like, codes),
            scales=tuple(scales),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_code(value: Any) -> str:
    try:
        name = jnp.dtype(value).name
    except TypeError:
        name = value  # Not a dtype; the message shows what was given.
    check.check_choice("dtype", name, CODES)
    return name


def _check_fields(fields: Any) -> tuple[str, ...]:
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


def _check_found(names: Sequence[str], fields: tuple[str, ...] | None) -> None:
    missing = set(fields or ()) - set(names)
    if missing or not names:
        raise ValueError(
            "the state of `inner` must have moments to code, got none in fields named"
            f" {', '.join(sorted(missing or KINDS))}; use `inner` alone, or name other"
            " `fields`"
        )


def _check_real_or_complex(names: Sequence[str], moments: Sequence[Any]) -> None:
    """Raises for moments that integers would round to zero; complex ones stay exact."""
    for name, tree in zip(names, moments, strict=True):
        for path, leaf in named_leaves(tree):
            if not jnp.issubdtype(leaf.dtype, jnp.inexact):
                raise TypeError(
                    f"`inner` must keep floating or complex moments, got {leaf.dtype}"
                    f" in {name!r} for leaf {path!r}; leave it out with optax.masked"
                )
