"""Rules for sums, which a sketch goes through, and products, where it ends."""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp

from flora_jax.sketched_grad.rules import (
    Atom,
    Axes,
    DataFlow,
    Rewrite,
    Rule,
    Target,
    dtype_of,
    shape_of,
)


def _identity(target: Target) -> Rewrite | str:
    """Copies, conversions, and what only tells XLA how to compute."""
    source = target.operands[target.index]
    if not jnp.issubdtype(dtype_of(source), jnp.floating):
        return "it converts from a dtype that is not a real floating one"
    return Rewrite([(source, target.request)], lambda _, x: x)


def _negate(target: Target) -> Rewrite:
    return target.commutes(target.request)


def _add(target: Target) -> Rewrite | str:
    subtracts = target.eqn.primitive.name == "sub"
    terms = [
        (x, subtracts and i == 1)
        for i, x in enumerate(target.operands)
        if not target.flow.is_zero(x)
    ]
    if not terms:
        return target.zeros()
    if any(shape_of(x) != target.shape for x, _ in terms):
        return "it broadcasts one of its terms"

    def compute(_: Any, *values: jax.Array) -> jax.Array:
        pairs = zip(terms, values, strict=True)
        signed = [-v if negative else v for (_, negative), v in pairs]
        return functools.reduce(operator.add, signed)

    return Rewrite([(x, target.request) for x, _ in terms], compute)


def _scale(target: Target) -> Rewrite | str:
    """A product or quotient with a value that does not vary along sketched axes."""
    multiplies = target.eqn.primitive.name == "mul"
    for here in (0, 1) if multiplies else (0,):
        linear, factor = target.operands[here], target.operands[1 - here]
        if shape_of(linear) != target.shape:
            continue
        found = _constant_along(factor, target.axes, len(target.shape), target.flow)
        if found is not None:
            return _scaled(target, linear, *found)
    return "both of its operands may vary along the sketched axes"


def _scaled(
    target: Target, linear: Atom, factor: Atom, shape: tuple[int, ...]
) -> Rewrite:
    operation = jnp.multiply if target.eqn.primitive.name == "mul" else jnp.divide
    return Rewrite(
        [(linear, target.request), (factor, None)],
        lambda _, x, c: operation(x, jnp.reshape(c, shape).astype(jnp.float32)),
    )


def _constant_along(
    atom: Atom, axes: Axes, ndim: int, flow: DataFlow
) -> tuple[Atom, tuple[int, ...]] | None:
    """A value to read and the shape in which it scales a sketch, or None."""
    if not shape_of(atom):
        return atom, ()
    eqn = flow.producer(atom)
    if eqn is None:
        return None
    source = eqn.invars[0]
    if eqn.primitive.name == "convert_element_type":
        wide = jnp.promote_types(dtype_of(source), dtype_of(atom))
        if wide != dtype_of(atom):  # It may change the value.
            return None
        return _constant_along(source, axes, ndim, flow)
    if eqn.primitive.name != "broadcast_in_dim" or len(eqn.invars) > 1:
        return None
    # The operand's axes keep their order in the output, so that this is a reshape.
    shape = [1] * ndim
    for d, n in zip(eqn.params["broadcast_dimensions"], shape_of(source), strict=True):
        shape[d] = n
    return None if any(shape[a] != 1 for a in axes) else (source, tuple(shape))


def _reduce_sum(target: Target) -> Rewrite | str:
    source, summed = target.operands[0], target.params["axes"]
    kept = [i for i in range(len(shape_of(source))) if i not in summed]
    request = target.along(kept[a] for a in target.axes)
    if not target.flow.reaches_product(source, request):
        # What it sums is larger than the sum: better to compute the sum in full.
        return "it sums up what cannot be sketched"
    return target.commutes(request)


def _sum_over_devices(target: Target) -> Rewrite | str:
    """Sketches are reduced, not gradients."""
    names = target.params["axes"]
    groups = target.params.get("axis_index_groups")
    if groups is not None or any(isinstance(name, int) for name in names):
        return "it sums over groups of devices or over axes of an array"
    source = target.operands[target.index]
    return Rewrite([(source, target.request)], lambda _, x: jax.lax.psum(x, names))


def _vary(target: Target) -> Rewrite:
    """A value that is declared to differ between devices."""
    names = target.params["axes"]
    return Rewrite(
        [(target.operands[target.index], target.request)],
        lambda _, x: jax.lax.pcast(x, names, to="varying"),
    )


_WIDE = tuple(jnp.dtype(x) for x in ("bfloat16", "float16", "float32", "float64"))


def _dot_general(target: Target) -> Rewrite | str:
    """S·(xᵀ δ) = (x Sᵀ)ᵀ δ: S goes to the operand that has the sketched axes."""
    contract, batch = target.params["dimension_numbers"]
    # The output's axes: batch axes, then each operand's free ones; as (operand, axis).
    origins: list[tuple[int | None, int]] = [(None, i) for i in range(len(batch[0]))]
    for number, x in enumerate(target.operands):
        used = (*contract[number], *batch[number])
        origins += [(number, i) for i in range(len(shape_of(x))) if i not in used]
    sides = {origins[a][0] for a in target.axes}
    if sides == {None}:
        return "the sketched axes are batch axes of the product"
    if len(sides) > 1:
        return "the sketched axes come from both of its operands"
    side = 0 if 0 in sides else 1
    if dtype_of(target.operands[side]) not in _WIDE:
        return "its operand is of a dtype too narrow for a sketch"
    request = target.along(origins[a][1] for a in target.axes)

    def compute(s: Any, *operands: jax.Array) -> jax.Array:
        pair = list(operands)
        # Not in float32 for bfloat16 operands: XLA on CPU fails to run some of those.
        pair[side] = s.sketch(pair[side], request).astype(pair[side].dtype)
        product = target.eqn.primitive.bind(*pair, **target.params)
        return product.astype(jnp.float32)

    return Rewrite([(x, None) for x in target.operands], compute)


def _scatter_add(target: Target) -> Rewrite | str:
    """The gradient of an embedding: rows of it are sketched, then added where they go.

    As in a product, S goes to the operand that has the sketched axes: the updates.
    """
    operand, indices, updates = target.operands
    p, d = target.params, target.params["dimension_numbers"]
    inserted = (*d.inserted_window_dims, *d.operand_batching_dims)
    if any(a in inserted or a in d.scatter_dims_to_operand_dims for a in target.axes):
        return "it scatters along sketched axes"
    windows = [i for i in range(len(target.shape)) if i not in inserted]
    window_axis = dict(zip(windows, d.update_window_dims, strict=True))
    if any(target.shape[a] != shape_of(updates)[window_axis[a]] for a in target.axes):
        return "it writes a part of sketched axes"
    request = target.along(window_axis[a] for a in target.axes)
    settings = ("indices_are_sorted", "unique_indices", "mode")

    def compute(s: Any, total: jax.Array, at: jax.Array, rows: jax.Array) -> jax.Array:
        # Not the equation itself, whose addition is that of the gradient's dtype.
        small = s.sketch(rows, request)
        return jax.lax.scatter_add(total, at, small, d, **{k: p[k] for k in settings})

    operands = [(operand, target.request), (indices, None), (updates, None)]
    return Rewrite(operands, compute)


ARITHMETIC_RULES: dict[str, Rule] = {
    "add": _add,
    "add_any": _add,
    "convert_element_type": _identity,
    "copy": _identity,
    "copy_p": _identity,
    "div": _scale,
    "dot_general": _dot_general,
    "mul": _scale,
    "neg": _negate,
    "optimization_barrier": _identity,
    "psum": _sum_over_devices,
    "psum_invariant": _sum_over_devices,
    "pvary": _vary,
    "reduce_sum": _reduce_sum,
    "scatter-add": _scatter_add,
    "sharding_constraint": _identity,
    "sub": _add,
}
