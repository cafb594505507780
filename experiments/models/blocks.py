"""What the models share: linear maps, attention, dropout, a stack of blocks, caches.

In the shapes below B is the batch, T the positions that ask, S the positions that are
read, W the width of the model, H the heads and D the width of a head.

Dropout keys are arguments, and None stands for no dropout: a model has no state beside
its parameters.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint

from experiments.models.config import Config

Key = Array | None

Batch = dict[str, Array]
"""For decoders "tokens" (B, T + 1) and perhaps "weights" and "first", see
`Decoder.training`; for T5 "source" (B, S) and "target" (B, T), both filled up with
token 0. To decode from, "source" for T5; for decoders "prompt" (B, S), padded on the
left, and "prompt_mask", bool (B, S), False on the padding."""

Biases = tuple[Array, ...]
"""Of attention's scores: float32, of shapes that broadcast to (B, H, T, S)."""

PART = 2**26
"""Bytes of attention scores, or of logits, that are computed at a time: of as many
positions as these are enough for, in all examples."""

MASKED = float(np.finfo(np.float32).min)
"""Score of a position that must not be read; finite, so that no row becomes NaN."""

# The places in the parameter tree where blocks are stacked or numbered.
_STACKS = ("h", "block", "layers")


def linear(
    n_in: int, n_out: int, std: float, config: Config, rngs: nnx.Rngs, **options: Any
) -> nnx.Linear:
    """Returns a linear map with normal weights, float32 whatever it computes in."""
    options |= {"kernel_init": nnx.initializers.normal(std), "dtype": config.dtype}
    return nnx.Linear(n_in, n_out, rngs=rngs, **options)


def embed(
    count: int, width: int, std: float, config: Config, rngs: nnx.Rngs
) -> nnx.Embed:
    """Returns a table (count, width) of normal samples."""
    init = nnx.initializers.normal(std)
    return nnx.Embed(count, width, embedding_init=init, dtype=config.dtype, rngs=rngs)


def logits_of(x: Array, table: nnx.Embed) -> Array:
    """Maps (B, T, W) to float32 logits (B, T, V) by an embedding table (V, W)."""
    weights = table.embedding[...].astype(x.dtype)
    return jnp.einsum("btw,vw->btv", x, weights, preferred_element_type=jnp.float32)


def split_key(key: Key, count: int) -> Sequence[Key]:
    """Splits a dropout key; no key gives no keys."""
    return (None,) * count if key is None else jax.random.split(key, count)


def dropout(x: Array, rate: float, key: Key) -> Array:
    """Zeroes each element with probability `rate` and scales the others up."""
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def recomputed(function: Callable[..., Any], config: Config) -> Callable[..., Any]:
    """The function, of which only the arguments are kept for the backward pass."""
    # A loop cannot be merged with its recomputation: it needs no barriers.
    return jax.checkpoint(function, prevent_cse=not config.scan)


def mask_bias(positions: Array) -> Array:
    """Returns a bias that hides positions, bool, from attention."""
    return jnp.where(positions, MASKED, 0)


def attend(
    q: Array, k: Array, v: Array, biases: Biases, config: Config, key: Key = None
) -> Array:
    """Attention: softmax(q k + biases) v, without a scale.

    Scores and softmax are float32 also under bfloat16, whose 8 bits are too few for a
    sum over many positions. Neither is kept for the backward pass: scores of `PART`
    bytes are computed again there, and are all that is in memory.

    Args:
        q: queries (B, T, H, D), scaled by the caller where the model does.
        k: keys (B, S, K, D); each for H / K queries.
        v: values (B, S, K, D).
        biases: all are added; `MASKED` hides.
        config: whose dropout the attention weights have.
        key: its key.

    Returns:
        (B, T, H * D), the heads side by side.
    """
    rows, length, heads, _ = q.shape
    count = _count(length, rows * heads * k.shape[1])

    def attention(q: Array, k: Array, v: Array, biases: Biases, key: Key) -> Array:
        k, v = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k, v))

        def of_part(q: Array, biases: Biases, key: Key) -> Array:
            scores = jnp.einsum(
                "bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32
            )
            weights = jax.nn.softmax(sum(biases, scores))
            weights = dropout(weights, config.dropout, key)
            return jnp.einsum("bhts,bshd->bthd", weights.astype(v.dtype), v)

        if count == 1:
            return of_part(q, biases, key)
        keys = None if key is None else jax.random.split(key, count)
        parts = _parts(q, 1, count), tuple(_parts(x, 2, count) for x in biases), keys
        return jnp.moveaxis(_in_turn(of_part, parts), 0, 1)

    out = recomputed(attention, config)(q, k, v, biases, key)
    return out.reshape(rows, length, -1)


def _in_turn(of_part: Callable[..., Array], parts: tuple[Any, ...]) -> Array:
    """Applies a function to each part in turn, and again in the backward pass."""
    of_part = jax.checkpoint(of_part, prevent_cse=False)
    return jax.lax.map(lambda part: of_part(*part), parts)


def _count(length: int, elements: int) -> int:
    """Into how many equal parts to divide positions of so many float32 each."""
    least = max(1, -(-4 * elements * length // PART))
    return next((n for n in range(least, length) if length % n == 0), length)


def _parts(x: Array, axis: int, count: int) -> Array:
    """Splits an axis and puts the parts first; an axis of size 1 is in each of them."""
    if x.shape[axis] == 1:
        return jnp.broadcast_to(x, (count, *x.shape))
    sides = x.shape[:axis], x.shape[axis + 1 :]
    x = x.reshape(*sides[0], count, x.shape[axis] // count, *sides[1])
    return jnp.moveaxis(x, axis, 0)


def losses(logits: Callable[[Array], Array], x: Array, labels: Array) -> Array:
    """Cross-entropy of labels, without the logits of all positions in memory.

    Args:
        logits: maps (B, n, W) to float32 logits (B, n, V), of `PART` bytes at a time,
            and again in the backward pass if that is not all of them.
        x: what it is applied to, (B, T, W).
        labels: ids, (B, T).

    Returns:
        float32 losses in nats, (B, T).
    """

    def of_part(x: Array, labels: Array) -> Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits(x), labels)

    vocabulary = jax.eval_shape(logits, x).shape[-1]
    count = _count(x.shape[1], x.shape[0] * vocabulary)
    if count == 1:
        return of_part(x, labels)
    parts = _parts(x, 1, count), _parts(labels, 1, count)
    return jnp.moveaxis(_in_turn(of_part, parts), 0, 1).reshape(labels.shape)


class KeysValues(NamedTuple):
    """Keys and values (B, S, H, D) of one layer; (layers, B, S, H, D) of a stack."""

    k: Array
    v: Array

    @classmethod
    def zeros(cls, shape: tuple[int, ...], dtype: str) -> "KeysValues":
        """Returns an empty cache."""
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def write(self, new: "KeysValues", index: Array) -> "KeysValues":
        """Returns a copy in which `new` stands from position `index` on."""

        def written(old: Array, part: Array) -> Array:
            part = part.astype(old.dtype)
            return jax.lax.dynamic_update_slice_in_dim(old, part, index, axis=1)

        return jax.tree.map(written, self, new)


Cache = KeysValues | None


class DecodeState(NamedTuple):
    """What decoding keeps between two tokens; nothing is cached in training.

    Attributes:
        cache: keys and values so far, (layers, B, L, H, D); a beam has its own.
        cross: those of the encoded source, (layers, B, S, H, D); None without encoder.
        mask: which positions may be read: bool, (B, L), or (B, S) of a source.
        index: the position that is written next: int32, a scalar; None if `cache` is.
    """

    cache: Cache
    cross: Cache
    mask: Array
    index: Array | None


def build(make: Callable[[], nnx.Module], layers: int, scan: bool) -> nnx.Module:
    """Builds the blocks of a stack.

    Args:
        make: samples one block.
        layers: how many.
        scan: stack them into one block whose parameters have a leading layer axis.

    Returns:
        A list of blocks, or the stacked one. The values are the same.
    """
    blocks = [make() for _ in range(layers)]
    if not scan:
        return nnx.List(blocks)
    states = [nnx.state(block) for block in blocks]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    return nnx.merge(nnx.graphdef(blocks[0]), stacked)


def run(
    blocks: nnx.Module,
    apply: Callable[..., tuple[Array, Any]],
    x: Array,
    per_layer: Any = (),
    remat: bool = False,
) -> tuple[Array, Any]:
    """Runs a stack that `build` made.

    Args:
        blocks: the stack.
        apply: `x, out = apply(block, x, *per_layer)` with this layer's part.
        x: the input of the first block.
        per_layer: a tuple of trees whose leaves have a leading layer axis.
        remat: keep only the inputs of each block for the backward pass.

    Returns:
        The output of the last block, and the `out` of all, stacked.
    """
    listed = isinstance(blocks, nnx.List)
    graphdef = nnx.graphdef(blocks[0] if listed else blocks)

    def step(x, layer):
        state, parts = layer
        return apply(nnx.merge(graphdef, state), x, *parts)

    if listed:
        step = jax.checkpoint(step) if remat else step
    else:
        xs = nnx.state(blocks), per_layer
        if remat:
            count = len(jax.tree.leaves(xs)[0])
            # A loop cannot be merged with its recomputation: it needs no barrier.
            step = jax.checkpoint(_with_own_weights(step), prevent_cse=False)
            return jax.lax.scan(step, x, (jnp.arange(count), *xs))
        return jax.lax.scan(step, x, xs)
    outs = []
    for i, block in enumerate(blocks):
        parts = jax.tree.map(lambda leaf, i=i: leaf[i], per_layer)
        x, out = step(x, (nnx.state(block), parts))
        outs.append(out)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)


def _with_own_weights(step: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps the step of a loop so that no TPU copies the weights of all layers.

    Its compiler would round and transpose them before the loop, into arrays of half the
    parameters' size and more. It moves neither a product with a 1 that it does not know
    nor a layout constraint out of the loop.
    """

    def own(state: Any, i: Array) -> Any:
        one = jnp.where(i >= 0, 1.0, 0.0)
        return jax.tree.map(lambda w: _as_stored(w) * one.astype(w.dtype), state)

    def with_own(x: Array, layer: tuple[Any, ...]) -> Any:
        i, state, parts = layer
        state = jax.lax.platform_dependent(
            state, i, tpu=own, default=lambda state, _: state
        )
        return step(x, (state, parts))

    return with_own


def _as_stored(weights: Array) -> Array:
    """One layer's weights in the order in which a TPU stores those of all layers."""
    order = tuple(range(weights.ndim))
    if weights.ndim > 1:
        n, m = weights.shape[-2:]
        # In tiles of 8 x 128, along the axis that wastes less.
        if -(-m // 8) * 8 * -(-n // 128) * 128 < -(-n // 8) * 8 * -(-m // 128) * 128:
            order = (*order[:-2], order[-1], order[-2])
    return with_layout_constraint(weights, Layout(order))


def stack(params: dict[str, Any]) -> dict[str, Any]:
    """Turns the parameters of numbered blocks into those of stacked ones, on the host.

    Args:
        params: the parameters of a model without `scan`.

    Returns:
        The parameters of the same model with `scan`.
    """

    def stacked(blocks):
        layers = [blocks[i] for i in range(len(blocks))]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *layers)

    return _with_stacks(params, stacked)


def unstack(params: dict[str, Any]) -> dict[str, Any]:
    """Undoes `stack`."""

    def numbered(blocks):
        layers = range(len(jax.tree.leaves(blocks)[0]))
        return {i: jax.tree.map(lambda x, i=i: x[i], blocks) for i in layers}

    return _with_stacks(params, numbered)


def _with_stacks(tree: Any, change: Callable[[Any], Any], name: str = "") -> Any:
    """Changes the parts of a parameter tree that hold the blocks of a stack."""
    if name in _STACKS:
        return change(tree)
    if not isinstance(tree, dict):
        return tree
    return {key: _with_stacks(part, change, key) for key, part in tree.items()}
