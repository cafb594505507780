"""The rules: what moves a value's entries, sums, and products, where a sketch ends.

At a product the sketch of one factor is asked for. It is taken where the factor is
computed, which may be in the forward pass, and moves only through what copies a value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax._typing import Axes, Shape
from flora_jax.sketched_grad import rewrites
from flora_jax.sketched_grad.rewrites import Atom, Rewrite, Rule, Target, shape_of

RULES: dict[str, Rule] = {}  # By the primitives' names.
# What the sketch of a factor moves through: its values and dtype stay as they are.
COPIES = frozenset(
    ("transpose", "reshape", "squeeze", "copy", "copy_p", "optimization_barrier")
    + ("sharding_constraint", "layout_constraint")
)
_TAKES_A_PART = "it takes a part of sketched axes"
# The part is smaller than the value that would be computed in full before it.
_SOURCE_IN_FULL = "it takes a part of a value that is computed in full"
_WIDE = tuple(jnp.dtype(x) for x in ("bfloat16", "float16", "float32", "float64"))


def _rule_for(*primitives: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(primitives, rule))
        return rule

    return register


@_rule_for("transpose")
def _transpose(target: Target) -> Rewrite:
    order = target.params["permutation"]
    return target.commutes(target.along(order[a] for a in target.axes))


@_rule_for("reshape", "squeeze")
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


def axes_before_reshape(old: Shape, new: Shape, axes: Axes) -> Axes | None:
    """Which axes of a reshape's operand become the sketched axes of its output.

    Args:
      old: shape of the operand.
      new: shape of the output.
      axes: sketched axes of the output.

    Returns:
      The operand's sketched axes, or None where an axis of the operand would be
      sketched in part or out of order.
    """
    # Without entries there is nothing to sketch, and the sizes tell no groups apart.
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


def _reshaped_groups(old: Shape, new: Shape) -> list[tuple[Axes, Axes]]:
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


@_rule_for("broadcast_in_dim")
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


@_rule_for("pad")
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


@_rule_for("concatenate")
def _concatenate(target: Target) -> Rewrite | str:
    if target.params["dimension"] in target.axes:
        return "it joins values along a sketched axis"
    return target.commutes(*[target.request] * len(target.operands))


@_rule_for("slice")
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


@_rule_for("split")
def _split(target: Target) -> Rewrite | str:
    """The gradient of a concatenation."""
    if target.params["axis"] in target.axes:
        return _TAKES_A_PART
    if not target.flow.reaches_product(target.operands[0], target.request):
        return _SOURCE_IN_FULL
    return target.commutes(target.request)


@_rule_for("dynamic_update_slice")
def _dynamic_update_slice(target: Target) -> Rewrite | str:
    """The gradient of a slice with a traced index, such as one layer of a stack."""
    _, update, *starts = target.operands
    if any(shape_of(update)[a] != target.shape[a] for a in target.axes):
        return "it writes a part of sketched axes"
    return target.commutes(target.request, target.request, *[None] * len(starts))


@_rule_for("convert_element_type", "copy", "copy_p")
@_rule_for("optimization_barrier", "sharding_constraint", "layout_constraint")
def _identity(target: Target) -> Rewrite | str:
    """Copies, conversions, and what only tells XLA how to compute."""
    source = target.operands[target.index]
    if not jnp.issubdtype(rewrites.dtype_of(source), jnp.floating):
        return "it converts from a dtype that is not a real floating one"
    return target.entrywise(lambda x: x)


@_rule_for("neg")
def _negate(target: Target) -> Rewrite:
    return target.commutes(target.request)


@_rule_for("add", "add_any", "sub")
def _add(target: Target) -> Rewrite | str:
    terms = [x for x in target.operands if not target.flow.is_zero(x)]
    if not terms:
        return target.zeros()
    if any(shape_of(x) != target.shape for x in terms):
        return "it broadcasts one of its terms"
    subtracts = target.eqn.primitive.name == "sub"
    operands = [(x, target.request) for x in terms]
    if len(terms) == 2:
        combine = jnp.subtract if subtracts else jnp.add
        return Rewrite(operands, lambda _, x, y: combine(x, y))
    negative = subtracts and terms[0] is target.operands[1]
    return Rewrite(operands, lambda _, x: -x if negative else x)


@_rule_for("mul", "div")
def _scale(target: Target) -> Rewrite | str:
    """A product or quotient with a value that does not vary along sketched axes."""
    multiplies = target.eqn.primitive.name == "mul"
    for here in (0, 1) if multiplies else (0,):
        linear, factor = target.operands[here], target.operands[1 - here]
        found = _constant_along(target, factor)
        if shape_of(linear) == target.shape and found is not None:
            break
    else:
        return "both of its operands may vary along the sketched axes"
    atom, shape = found
    operation = jnp.multiply if multiplies else jnp.divide
    return Rewrite(
        [(linear, target.request), (atom, None)],
        lambda _, x, c: operation(x, jnp.reshape(c, shape).astype(jnp.float32)),
    )


def _constant_along(target: Target, atom: Atom) -> tuple[Atom, Shape] | None:
    """A value to read and the shape in which it scales a sketch, or None."""
    if not shape_of(atom):
        return atom, ()
    eqn = target.flow.producer(atom)
    if eqn is None:
        return None
    source = eqn.invars[0]
    if eqn.primitive.name == "convert_element_type":
        wide = jnp.promote_types(rewrites.dtype_of(source), rewrites.dtype_of(atom))
        # A narrower one may change the value.
        return (
            _constant_along(target, source) if wide == rewrites.dtype_of(atom) else None
        )
    if eqn.primitive.name != "broadcast_in_dim" or len(eqn.invars) > 1:
        return None
    # The operand's axes keep their order in the output, so that this is a reshape.
    shape = [1] * len(target.shape)
    for d, n in zip(eqn.params["broadcast_dimensions"], shape_of(source), strict=True):
        shape[d] = n
    return None if any(shape[a] != 1 for a in target.axes) else (source, tuple(shape))


@_rule_for("reduce_sum")
def _reduce_sum(target: Target) -> Rewrite | str:
    source, summed = target.operands[0], target.params["axes"]
    kept = [i for i in range(len(shape_of(source))) if i not in summed]
    request = target.along(kept[a] for a in target.axes)
    if not target.flow.reaches_product(source, request):
        # What it sums is larger than the sum: better to compute the sum in full.
        return "it sums up what cannot be sketched"
    return target.commutes(request)


@_rule_for("psum", "psum_invariant")
def _sum_over_devices(target: Target) -> Rewrite | str:
    """Sketches are reduced, not gradients."""
    names = target.params["axes"]
    groups = target.params.get("axis_index_groups")
    if groups is not None or any(isinstance(name, int) for name in names):
        return "it sums over groups of devices or over axes of an array"
    return target.entrywise(lambda x: jax.lax.psum(x, names))


@_rule_for("pvary")
def _vary(target: Target) -> Rewrite:
    """A value that is declared to differ between devices."""
    names = target.params["axes"]
    return target.entrywise(lambda x: jax.lax.pcast(x, names, to="varying"))


@_rule_for("dot_general")
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
    if rewrites.dtype_of(target.operands[side]) not in _WIDE:
        return "its operand is of a dtype too narrow for a sketch"
    request = target.request.factor(origins[a][1] for a in target.axes)

    def compute(_: Any, *pair: jax.Array) -> jax.Array:
        return target.eqn.primitive.bind(*pair, **target.params).astype(jnp.float32)

    operands: list[rewrites.Operand] = [(x, None) for x in target.operands]
    operands[side] = target.operands[side], request
    return Rewrite(operands, compute)


@_rule_for("scatter-add")
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
