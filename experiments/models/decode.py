"""Greedy and beam decoding with a cache, each one compiled program.

Both return only the new tokens. In the shapes below B is the batch, K the beams, V the
vocabulary and `length` the number of tokens to generate at most.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.nnx import GraphDef, merge
from jax import Array

from experiments.models.blocks import Batch, DecodeState
from experiments.models.build import Params


@functools.partial(jax.jit, static_argnames=("length", "eos", "pad"))
def greedy(
    graphdef: GraphDef, params: Params, batch: Batch, *, length: int, eos: int, pad: int
) -> Array:
    """Takes the likeliest token, again and again.

    Args:
        graphdef: the model's static part.
        params: its parameters.
        batch: see `Batch`.
        length: how many tokens to generate at most.
        eos: token that ends a row; it is kept.
        pad: token that fills up a row after its end.

    Returns:
        int32, (B, length).

    Raises:
        ValueError: `length` is not positive, or more than the context has room for.
    """
    _check("length", length)
    logits, state = merge(graphdef, params).start(batch, length)
    first = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    tokens = jnp.full((len(first), length), pad, jnp.int32).at[:, 0].set(first)

    def unfinished(carry):
        t, _, _, done, _ = carry
        return (t < length) & ~done.all()

    def body(carry):
        t, tokens, last, done, state = carry
        logits, state = merge(graphdef, params).step(state, last)
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        best = jnp.where(done, pad, best)
        return t + 1, tokens.at[:, t].set(best), best, done | (best == eos), state

    carry = (jnp.int32(1), tokens, first, first == eos, state)
    return jax.lax.while_loop(unfinished, body, carry)[1]


class _Beams(NamedTuple):
    """What beam search carries from one token to the next."""

    t: Array  # tokens generated so far
    tokens: Array  # of the unfinished, (B, K, length)
    sums: Array  # their log-probabilities, (B, K), best first
    done_tokens: Array  # the best finished ones, (B, K, length)
    done_scores: Array  # their scores, (B, K), best first
    logits: Array  # of the token to come, (B, K, V)
    state: DecodeState  # with B * K rows


@functools.partial(
    jax.jit, static_argnames=("length", "eos", "pad", "beams", "length_penalty")
)
def beam(
    graphdef: GraphDef,
    params: Params,
    batch: Batch,
    *,
    length: int,
    eos: int,
    pad: int,
    beams: int,
    length_penalty: float = 1.0,
) -> Array:
    """Keeps the `beams` likeliest beginnings of each row, and returns its best end.

    The score of a finished text is the sum of its log-probabilities divided by its
    length, the end included, to the power of `length_penalty`. A row continues until no
    beginning that is left could still score higher, or to the full length, where the
    unfinished count as finished.

    Args:
        graphdef: the model's static part.
        params: its parameters.
        batch: see `Batch`.
        length: how many tokens to generate at most.
        eos: token that ends a row; it is kept.
        pad: token that fills up a row after its end.
        beams: K. Even 1 differs from `greedy`: it continues past an end, with the next
            best token, as long as a longer text could score higher.
        length_penalty: above 0 prefers long texts, below 0 short ones.

    Returns:
        int32, (B, length).

    Raises:
        ValueError: `length` or `beams` is not positive, or `length` is more than the
            context has room for.
    """
    _check("length", length)
    _check("beams", beams)
    logits, state = merge(graphdef, params).start(batch, length)
    rows = len(logits)
    empty = jnp.full((rows, beams, length), pad, jnp.int32)
    # All beginnings are the same one; the others must not be chosen from.
    sums = jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf)
    first = _Beams(
        t=jnp.int32(0),
        tokens=empty,
        sums=jnp.tile(sums, (rows, 1)),
        done_tokens=empty,
        done_scores=jnp.full((rows, beams), -jnp.inf),
        logits=jnp.repeat(logits[:, None], beams, axis=1),
        state=_repeat(state, beams),
    )

    def advance(carry: _Beams) -> _Beams:
        carry, parents = _select(carry, eos, length_penalty)
        last = jax.lax.dynamic_index_in_dim(carry.tokens, carry.t - 1, 2, False)
        state = _reorder(carry.state, parents)
        logits, state = merge(graphdef, params).step(state, last.reshape(-1))
        return carry._replace(logits=logits.reshape(carry.logits.shape), state=state)

    def open_rows(carry: _Beams) -> Array:
        # Sums only fall, so that this bounds what the best beginning can reach.
        end = length if length_penalty > 0 else carry.t + 1
        reachable = carry.sums[:, 0] / end**length_penalty
        return (reachable > carry.done_scores[:, 0]).any()

    last = jax.lax.while_loop(
        lambda carry: (carry.t < length - 1) & open_rows(carry), advance, first
    )
    # The tokens at full length need no further step of the model.
    end, _ = _select(last, eos, length_penalty)
    at_length = end.t == length
    left = jnp.where(at_length, end.sums / length**length_penalty, -jnp.inf)
    scores = jnp.concatenate([end.done_scores, left], axis=1)
    texts = jnp.concatenate([end.done_tokens, end.tokens], axis=1)
    return _take(texts, jnp.argmax(scores, axis=1)[:, None])[:, 0]


def _select(carry: _Beams, eos: int, length_penalty: float) -> tuple[_Beams, Array]:
    """Appends one token: the carry without new logits, and parents (B, K)."""
    rows, beams, vocabulary = carry.logits.shape
    sums = carry.sums[..., None] + jax.nn.log_softmax(carry.logits)
    # Each beginning has one way to end, so that of 2 K at least K go on.
    sums, flat = jax.lax.top_k(sums.reshape(rows, -1), 2 * beams)
    parents, new = flat // vocabulary, flat % vocabulary
    tokens = _take(carry.tokens, parents).at[:, :, carry.t].set(new)
    ends = new == eos

    # An end that K better continuations precede is no candidate.
    scores = sums / (carry.t + 1.0) ** length_penalty
    scores = jnp.where(ends & (jnp.arange(2 * beams) < beams), scores, -jnp.inf)
    scores = jnp.concatenate([carry.done_scores, scores], axis=1)
    done_scores, kept = jax.lax.top_k(scores, beams)
    done_tokens = _take(jnp.concatenate([carry.done_tokens, tokens], axis=1), kept)

    sums, kept = jax.lax.top_k(jnp.where(ends, -jnp.inf, sums), beams)
    carry = carry._replace(
        t=carry.t + 1,
        tokens=_take(tokens, kept),
        sums=sums,
        done_tokens=done_tokens,
        done_scores=done_scores,
    )
    return carry, _take(parents, kept)


def _take(x: Array, indices: Array) -> Array:
    """Picks along axis 1 of (B, N, ...), for each row its own (B, M)."""
    return jax.vmap(lambda row, index: row[index])(x, indices)


def _repeat(state: DecodeState, beams: int) -> DecodeState:
    """Gives each row of the batch `beams` rows, next to each other."""
    caches = (state.cache, state.cross)
    caches = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=1), caches)
    return DecodeState(*caches, jnp.repeat(state.mask, beams, axis=0), state.index)


def _reorder(state: DecodeState, parents: Array) -> DecodeState:
    # Source and prompt are the same in all beams of a row: only the cache moves.
    rows, beams = parents.shape
    order = (jnp.arange(rows)[:, None] * beams + parents).reshape(-1)
    return state._replace(cache=jax.tree.map(lambda x: x[:, order], state.cache))


def _check(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}")
