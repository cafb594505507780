"""Rules for equations that move a value's entries: they move its sketch's."""

from __future__ import annotations

import jax
import numpy as np

from flora_jax.sketched_grad.rules import Axes, Rewrite, Rule, Target, shape_of

_TAKES_A_PART = "it takes a part of sketched axes"
# The part is smaller than the value that would be computed in full before it.
_SOURCE_IN_FULL = "it takes a part of a value that is computed in full"


def _transpose(target: Target) -> Rewrite:
    return target.commutes(
        target.along(target.params["permutation"][a] for a in target.axes)
    )


def _reshape(target: Target) -> Rewrite | str:
    source, shape, request = target.operands[0], target.shape, target.request
    axes = axes_before_reshape(shape_of(source), shape, target.axes)
    permutes = target.eqn.primitive.name == "reshape" and target.params["dimensions"]
    if axes is None or permutes:
        return "it splits sketched axes, or joins them with others"
    return Rewrite(
        [(source, target.along(axes))],
        lambda s, x: x.reshape(s.resized(shape, request)),
    )


def axes_before_reshape(
    old: tuple[int, ...], new: tuple[int, ...], axes: Axes
) -> Axes | None:
    """Which axes of a reshape's operand become the sketched axes of its output.

    Args:
      old: shape of the operand.
      new: shape of the output.
      axes: sketched axes of the output.

    Returns:
      The operand's sketched axes, or None where an axis of the operand would be
      sketched in part or out of order.
    """
    if 0 in old:
        return None
    groups = _reshaped_groups(old, new)
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


def _reshaped_groups(
    old: tuple[int, ...], new: tuple[int, ...]
) -> list[tuple[Axes, Axes]]:
    """The smallest groups of consecutive axes that a reshape turns into each other.

    Their borders are where the products of the sizes so far agree.
    """
    groups: list[tuple[Axes, Axes]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        a, b = i, j
        n = m = 1
        while (i, j) == (a, b) or n != m:
            if i < len(old) and (n <= m or j == len(new)):
                n, i = n * old[i], i + 1
            else:
                m, j = m * new[j], j + 1
        groups.append((tuple(range(a, i)), tuple(range(b, j))))
    return groups


def _broadcast(target: Target) -> Rewrite | str:
    source, shape, request = target.operands[0], target.shape, target.request
    if target.flow.is_zero(source):
        return target.zeros()
    dims = [int(d) for d in target.params["broadcast_dimensions"]]
    places = {d: i for i, d in enumerate(dims) if shape_of(source)[i] == shape[d]}
    if len(target.operands) > 1 or not set(target.axes) <= set(places):
        return "it broadcasts along sketched axes"
    return Rewrite(
        [(source, target.along(places[a] for a in target.axes))],
        lambda s, x: jax.lax.broadcast_in_dim(x, s.resized(shape, request), dims),
    )


def _pad(target: Target) -> Rewrite | str:
    source, value = target.operands
    config = target.params["padding_config"]
    if any(tuple(config[a]) != (0, 0, 0) for a in target.axes):
        return "it pads sketched axes"
    if not target.flow.is_zero(value):
        return "it pads with what may not be zero"
    return Rewrite(
        [(source, target.request)], lambda _, x: jax.lax.pad(x, np.float32(0), config)
    )


def _concatenate(target: Target) -> Rewrite | str:
    if target.params["dimension"] in target.axes:
        return "it joins values along a sketched axis"
    return target.commutes(*[target.request] * len(target.operands))


def _slice(target: Target) -> Rewrite | str:
    source, request, p = target.operands[0], target.request, target.params
    if any(shape_of(source)[a] != target.shape[a] for a in target.axes):
        return _TAKES_A_PART
    if not target.flow.reaches_product(source, request):
        return _SOURCE_IN_FULL
    start, limit = p["start_indices"], p["limit_indices"]
    return Rewrite(
        [(source, request)],
        lambda s, x: jax.lax.slice(x, start, s.resized(limit, request), p["strides"]),
    )


def _split(target: Target) -> Rewrite | str:
    """The gradient of a concatenation."""
    if target.params["axis"] in target.axes:
        return _TAKES_A_PART
    if not target.flow.reaches_product(target.operands[0], target.request):
        return _SOURCE_IN_FULL
    return target.commutes(target.request)


def _dynamic_update_slice(target: Target) -> Rewrite | str:
    """The gradient of a slice with a traced index, such as one layer of a stack."""
    _, update, *starts = target.operands
    if any(shape_of(update)[a] != target.shape[a] for a in target.axes):
        return "it writes a part of sketched axes"
    return target.commutes(target.request, target.request, *[None] * len(starts))


SHAPE_RULES: dict[str, Rule] = {
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
