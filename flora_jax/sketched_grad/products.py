"""Rules for sums and products: where a sketch divides, and where it ends."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.sketched_grad.push import (
    Axes,
    Look,
    Push,
    Rule,
    Want,
    rest,
    zeros,
)


def _unchanged(eqn: Any, index: int, want: Want, look: Look) -> Push | str:
    """Negation, copies, conversions, and what only tells XLA how to compute."""
    del look
    source, name = eqn.invars[index], eqn.primitive.name
    if not jnp.issubdtype(source.aval.dtype, jnp.floating):
        return "it converts from a dtype that is not a real floating one"
    sign = -1.0 if name == "neg" else 1.0
    return Push([(source, want)], lambda s, x: sign * x if sign < 0 else x)


def _add(eqn: Any, index: int, want: Want, look: Look) -> Push | str:
    del index
    shape = eqn.outvars[0].aval.shape
    terms = [
        (x, -1.0 if i and eqn.primitive.name == "sub" else 1.0)
        for i, x in enumerate(eqn.invars)
        if not look.is_zero(x)
    ]
    if not terms:
        return zeros(eqn, want)
    if any(x.aval.shape != shape for x, _ in terms):
        return "it broadcasts one of its terms"

    def apply(s: Any, *values: jax.Array) -> jax.Array:
        del s
        signed = [
            -v if sign < 0 else v for (_, sign), v in zip(terms, values, strict=True)
        ]
        return functools.reduce(operator.add, signed)

    return Push([(x, want) for x, _ in terms], apply)


def _scale(eqn: Any, index: int, want: Want, look: Look) -> Push | str:
    """A product or quotient with a value that does not vary along the axes."""
    del index
    shape, places = eqn.outvars[0].aval.shape, (0, 1)
    for here in places if eqn.primitive.name == "mul" else (0,):
        linear, factor = eqn.invars[here], eqn.invars[1 - here]
        if linear.aval.shape != shape:
            continue
        found = _constant_along(factor, want.axes, len(shape), look)
        if found is not None:
            operation = jnp.multiply if eqn.primitive.name == "mul" else jnp.divide
            read, arrange = found

            def apply(s: Any, x: Any, c: Any, do: Any = operation, to: Any = arrange):
                del s
                return do(x, to(c).astype(jnp.float32))

            return Push([(linear, want), (read, None)], apply)
    return "both of its operands may vary along the sketched axes"


def _constant_along(
    atom: Any, axes: Axes, ndim: int, look: Look
) -> tuple[Any, Callable[[Any], jax.Array]] | None:
    """A value to read, and how to make a factor of the sketch from it; or None."""
    shape = atom.aval.shape
    if not shape:
        return atom, jnp.asarray
    if all(shape[i] == 1 for i in axes):
        return atom, lambda c: jax.lax.squeeze(c, axes)[..., None]
    eqn = look.producer(atom)
    if eqn is None:
        return None
    source = eqn.invars[0]
    if eqn.primitive.name == "convert_element_type":
        wide = jnp.promote_types(source.aval.dtype, atom.aval.dtype)
        if wide != atom.aval.dtype:  # It may change the value.
            return None
        return _constant_along(source, axes, ndim, look)
    if eqn.primitive.name != "broadcast_in_dim" or len(eqn.invars) > 1:
        return None
    sizes = source.aval.shape
    dims = [int(d) for d in eqn.params["broadcast_dimensions"]]
    if any(d in axes and n != 1 for d, n in zip(dims, sizes, strict=True)):
        return None
    spread = [1] * ndim
    for d, n in zip(dims, sizes, strict=True):
        spread[d] = n
    # Operand axes lie in increasing order in the output, so that this is a reshape.
    return source, lambda c: jax.lax.squeeze(c.reshape(spread), axes)[..., None]


def _reduce_sum(eqn: Any, index: int, want: Want, look: Look) -> Push | str:
    del index
    source = eqn.invars[0]
    gone = {int(i) for i in eqn.params["axes"]}
    kept = [i for i in range(len(source.aval.shape)) if i not in gone]
    inner = Want(want.leaf, tuple(kept[a] for a in want.axes))
    if not look.ends_well(source, inner):
        # What it sums is larger than the sum: better to stop here.
        return "it sums up what cannot be sketched"
    left = rest(len(source.aval.shape), inner.axes)
    places = tuple(left.index(i) for i in sorted(gone))
    return Push([(source, inner)], lambda s, x: x.sum(places))


def _psum(eqn: Any, index: int, want: Want, look: Look) -> Push | str:
    """A reduction over devices: sketches are reduced, not gradients."""
    del look
    names = eqn.params["axes"]
    groups = eqn.params.get("axis_index_groups")
    if groups is not None or any(isinstance(name, int) for name in names):
        return "it sums over groups of devices or over axes of an array"
    return Push([(eqn.invars[index], want)], lambda s, x: jax.lax.psum(x, names))


_WIDE = tuple(jnp.dtype(x) for x in ("bfloat16", "float16", "float32", "float64"))


def _dot_general(eqn: Any, index: int, want: Want, look: Look) -> Push | str:
    """S·(xᵀ δ) = (x Sᵀ)ᵀ δ: S goes to the operand that has the sketched axes."""
    del index, look
    contract, batch = eqn.params["dimension_numbers"]
    used = [{*map(int, c), *map(int, b)} for c, b in zip(contract, batch, strict=True)]
    free = [
        [i for i in range(len(x.aval.shape)) if i not in gone]
        for x, gone in zip(eqn.invars, used, strict=True)
    ]
    origin: list[tuple[int, int]] = [(-1, i) for i in range(len(batch[0]))]
    origin += [(side, i) for side in (0, 1) for i in free[side]]
    sides = {origin[a][0] for a in want.axes}
    if sides == {-1}:
        return "the sketched axes are batch axes of the product"
    if len(sides) > 1:
        return "the sketched axes come from both of its operands"
    (side,) = sides
    if eqn.invars[side].aval.dtype not in _WIDE:
        return "its operand is of a dtype too narrow for a sketch"
    axes = tuple(origin[a][1] for a in want.axes)
    dims = [[list(map(int, d)) for d in pair] for pair in (contract, batch)]
    left = rest(len(eqn.invars[side].aval.shape), axes)
    for pair in dims:
        pair[side] = [left.index(i) for i in pair[side]]
    numbers = ((dims[0][0], dims[0][1]), (dims[1][0], dims[1][1]))
    # Where r is among the output's axes; it goes last.
    place = len(batch[0]) + len(free[0]) - len(axes) if side == 0 else -1
    precision, dtype = eqn.params["precision"], eqn.outvars[0].aval.dtype

    def apply(s: Any, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        pair = [lhs, rhs]
        small = s.sketch(want.leaf, pair[side], axes)
        pair[side] = small.astype(pair[side].dtype)
        # Not in float32 for bfloat16 operands: XLA on CPU fails to run some of those.
        product = jax.lax.dot_general(pair[0], pair[1], numbers, precision, dtype)
        return jnp.moveaxis(product, place, -1).astype(jnp.float32)

    return Push([(x, None) for x in eqn.invars], apply)


def _vary(eqn: Any, index: int, want: Want, look: Look) -> Push:
    """A value that is declared to differ between devices."""
    del look
    names = eqn.params["axes"]
    return Push(
        [(eqn.invars[index], want)],
        lambda s, x: jax.lax.pcast(x, names, to="varying"),
    )


def _scatter_add(eqn: Any, index: int, want: Want, look: Look) -> Push | str:
    """The gradient of an embedding: rows of it are sketched, then added where they go.

    As in a product, S goes to the operand that has the sketched axes: the updates.
    """
    del index, look
    operand, indices, updates = eqn.invars
    p, d = eqn.params, eqn.params["dimension_numbers"]
    gone = {*d.inserted_window_dims, *d.operand_batching_dims}
    windows = [i for i in range(len(operand.aval.shape)) if i not in gone]
    place = dict(zip(windows, d.update_window_dims, strict=True))
    if any(a in gone or a in d.scatter_dims_to_operand_dims for a in want.axes):
        return "it scatters along sketched axes"
    axes = tuple(place[a] for a in want.axes)
    sizes = operand.aval.shape, updates.aval.shape
    if any(sizes[0][a] != sizes[1][b] for a, b in zip(want.axes, axes, strict=True)):
        return "it writes a part of sketched axes"
    left, over = rest(len(sizes[0]), want.axes), rest(len(sizes[1]), axes)

    def renumbered(dims: Any) -> tuple[int, ...]:
        return tuple(left.index(i) for i in dims)

    kept = tuple(over.index(i) for i in d.update_window_dims if i in over)
    numbers = jax.lax.ScatterDimensionNumbers(
        (*kept, len(over)),
        renumbered(d.inserted_window_dims),
        renumbered(d.scatter_dims_to_operand_dims),
        renumbered(d.operand_batching_dims),
        d.scatter_indices_batching_dims,
    )

    def apply(s: Any, total: jax.Array, at: jax.Array, rows: jax.Array) -> jax.Array:
        return jax.lax.scatter_add(
            total,
            at,
            s.sketch(want.leaf, rows, axes),
            numbers,
            indices_are_sorted=p["indices_are_sorted"],
            unique_indices=p["unique_indices"],
            mode=p["mode"],
        )

    return Push([(operand, want), (indices, None), (updates, None)], apply)


PRODUCTS: dict[str, Rule] = {
    "add": _add,
    "add_any": _add,
    "convert_element_type": _unchanged,
    "copy": _unchanged,
    "copy_p": _unchanged,
    "div": _scale,
    "dot_general": _dot_general,
    "mul": _scale,
    "neg": _unchanged,
    "optimization_barrier": _unchanged,
    "psum": _psum,
    "psum_invariant": _psum,
    "pvary": _vary,
    "reduce_sum": _reduce_sum,
    "scatter-add": _scatter_add,
    "sharding_constraint": _unchanged,
    "sub": _add,
}
