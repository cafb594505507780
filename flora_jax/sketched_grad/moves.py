"""Rules for equations that move a value's entries: they move its sketch's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.sketched_grad.push import (
    Axes,
    Look,
    Push,
    Read,
    Rule,
    Want,
    rest,
    rest_shape,
    zeros,
)


def _transpose(eqn: Any, index: int, want: Want, look: Look) -> Push:
    del index, look
    order = eqn.params["permutation"]
    axes = tuple(order[a] for a in want.axes)
    before = rest(len(order), axes)
    moved = [before.index(order[a]) for a in rest(len(order), want.axes)]
    return Push(
        [(eqn.invars[0], Want(want.leaf, axes))],
        lambda s, x: x.transpose(*moved, x.ndim - 1),
    )


def _reshape(eqn: Any, index: int, want: Want, look: Look) -> Push | str:
    del index, look
    source, out = eqn.invars[0], eqn.outvars[0]
    axes = axes_before_reshape(source.aval.shape, out.aval.shape, want.axes)
    permutes = eqn.primitive.name == "reshape" and eqn.params["dimensions"] is not None
    if axes is None or permutes:
        return "it cuts or joins sketched axes with others"
    shape = rest_shape(out, want.axes)
    return Push(
        [(source, Want(want.leaf, axes))],
        lambda s, x: x.reshape(*shape, x.shape[-1]),
    )


def axes_before_reshape(
    old: tuple[int, ...], new: tuple[int, ...], axes: Axes
) -> Axes | None:
    """Which axes of a reshape's operand become the sketched axes of its output.

    The shapes are cut at the places where their products agree. Between two of them a
    group of axes becomes another, and must be sketched as a whole and in order.

    Args:
      old: shape of the operand.
      new: shape of the output.
      axes: sketched axes of the output.

    Returns:
      The operand's sketched axes, or None if a group is sketched in part.
    """
    if 0 in old:
        return None
    groups: list[tuple[Axes, Axes]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        a, b = i, j
        n = m = 1
        while True:
            if n <= m and i < len(old):
                n, i = n * old[i], i + 1
            elif j < len(new):
                m, j = m * new[j], j + 1
            else:
                n, i = n * old[i], i + 1
            if n == m:
                break
        groups.append((tuple(range(a, i)), tuple(range(b, j))))
    found: list[int] = []
    left = list(axes)
    while left:
        before, after = next(g for g in groups if left[0] in g[1])
        after = tuple(k for k in after if new[k] != 1)
        if tuple(left[: len(after)]) != after:
            return None
        found += [k for k in before if old[k] != 1]
        left = left[len(after) :]
    return tuple(found)


def _broadcast(eqn: Any, index: int, want: Want, look: Look) -> Push | str:
    del index
    source = eqn.invars[0]
    if look.is_zero(source):
        return zeros(eqn, want)
    dims = [int(d) for d in eqn.params["broadcast_dimensions"]]
    sizes, shape = source.aval.shape, eqn.outvars[0].aval.shape
    whole = {d: i for i, d in enumerate(dims) if sizes[i] == shape[d]}
    if len(eqn.invars) > 1 or not set(want.axes) <= set(whole):
        return "it broadcasts along sketched axes"
    axes = tuple(whole[a] for a in want.axes)
    kept, left = rest(len(sizes), axes), rest(len(shape), want.axes)
    places = [left.index(dims[i]) for i in kept]
    sides = tuple(shape[i] for i in left)
    return Push(
        [(source, Want(want.leaf, axes))],
        lambda s, x: jax.lax.broadcast_in_dim(
            x, (*sides, x.shape[-1]), (*places, len(left))
        ),
    )


def _pad(eqn: Any, index: int, want: Want, look: Look) -> Push | str:
    del index
    source, value = eqn.invars
    config = eqn.params["padding_config"]
    if any(tuple(config[a]) != (0, 0, 0) for a in want.axes):
        return "it pads sketched axes"
    if not look.is_zero(value):
        return "it pads with what may not be zero"
    sides = [config[i] for i in rest(len(config), want.axes)]
    zero = np.float32(0)
    return Push(
        [(source, want)], lambda s, x: jax.lax.pad(x, zero, [*sides, (0, 0, 0)])
    )


def _concatenate(eqn: Any, index: int, want: Want, look: Look) -> Push | str:
    del index, look
    dimension = eqn.params["dimension"]
    if dimension in want.axes:
        return "it joins values along a sketched axis"
    place = rest(len(eqn.outvars[0].aval.shape), want.axes).index(dimension)
    return Push(
        [(x, want) for x in eqn.invars],
        lambda s, *parts: jnp.concatenate(parts, place),
    )


def _slice(eqn: Any, index: int, want: Want, look: Look) -> Push | str:
    del index
    source, out, p = eqn.invars[0], eqn.outvars[0], eqn.params
    shape = source.aval.shape
    if any(shape[a] != out.aval.shape[a] for a in want.axes):
        return "it cuts sketched axes"
    if not look.ends_well(source, want):
        return "it cuts from what cannot be sketched"
    left = rest(len(shape), want.axes)
    steps = p["strides"] or (1,) * len(shape)
    at = [tuple(v[i] for i in left) for v in (p["start_indices"], p["limit_indices"])]
    strides = (*(steps[i] for i in left), 1)
    return Push(
        [(source, want)],
        lambda s, x: jax.lax.slice(x, (*at[0], 0), (*at[1], x.shape[-1]), strides),
    )


def _split(eqn: Any, index: int, want: Want, look: Look) -> Push | str:
    """The gradient of a concatenation."""
    source, axis = eqn.invars[0], eqn.params["axis"]
    if axis in want.axes:
        return "it cuts sketched axes"
    if not look.ends_well(source, want):
        return "it cuts from what cannot be sketched"
    place = rest(len(source.aval.shape), want.axes).index(axis)
    sizes = [int(size) for size in eqn.params["sizes"]]
    start = sum(sizes[:index])
    return Push(
        [(source, want)],
        lambda s, x: jax.lax.slice_in_dim(x, start, start + sizes[index], axis=place),
    )


def _dynamic_update_slice(eqn: Any, index: int, want: Want, look: Look) -> Push | str:
    """The gradient of a slice with a traced index, such as one layer of a stack."""
    del index, look
    operand, update, *starts = eqn.invars
    if any(operand.aval.shape[a] != update.aval.shape[a] for a in want.axes):
        return "it writes a part of sketched axes"
    left = rest(len(starts), want.axes)
    reads: list[Read] = [(operand, want), (update, want)]
    reads += [(starts[i], None) for i in left]

    def apply(s: Any, x: jax.Array, new: jax.Array, *at: Any) -> jax.Array:
        del s
        end = jnp.zeros((), jnp.result_type(*at) if at else jnp.int32)
        # The equation clamps indices, and has normalised negative ones before.
        return jax.lax.dynamic_update_slice(
            x, new, (*at, end), allow_negative_indices=False
        )

    return Push(reads, apply)


MOVES: dict[str, Rule] = {
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "dynamic_update_slice": _dynamic_update_slice,
    "pad": _pad,
    "reshape": _reshape,
    "slice": _slice,
    "split": _split,
    "squeeze": _reshape,
    "transpose": _transpose,
}
