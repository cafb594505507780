"""T5 (Raffel et al., 2020) in Flax NNX: v1.0, and v1.1 with gated feed-forward parts.

Encoder and decoder of pre-norm blocks; norms divide by the root mean square and have
neither mean nor bias; no linear map has a bias; attention scores are not scaled but
get a learned bias for the bucket of the relative position. In v1.0 the embedding is
the head too, and the decoder's output is scaled by W^-1/2 before it.

Modules are named as in Hugging Face's `T5Model`. What differs is the last word of a
name, where Flax says `kernel`, `scale` or `embedding`; that kernels are (in, out); and
that `relative_attention_bias` belongs to the stack and not to its first block.

In the shapes below B is the batch, S and T the lengths of source and target, W the
width, H the heads, D the width of a head, L the length of the cache and V the
vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from experiments.models import blocks
from experiments.models.blocks import (
    Batch,
    Biases,
    Cache,
    DecodeState,
    Key,
    KeysValues,
)
from experiments.models.config import T5Config

PAD = 0
"""Token that fills up sources and targets, and that starts the decoder."""

_EPSILON = 1e-6  # of the norms

_linear = functools.partial(blocks.linear, use_bias=False)


class RMSNorm(nnx.Module):
    """Divides by the root mean square over W; a scale, no mean and no bias."""

    def __init__(self, config: T5Config):
        """Starts with scales of one."""
        self.scale = nnx.Param(jnp.ones(config.width))
        self.dtype = config.dtype

    def __call__(self, x: Array) -> Array:
        """Maps (B, T, W) to (B, T, W), in float32 inside."""
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(x**2, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(mean_square + _EPSILON)
        return (x * self.scale[...]).astype(self.dtype)


def bucket_of(
    offset: Array, *, both_directions: bool, buckets: int, max_distance: int
) -> Array:
    """Returns the bucket of relative positions.

    Half of the buckets have one distance each, 0, 1, ..., n - 1. Bucket n + i holds
    the distances from n (max_distance / n)^(i / n) on, so that they grow wider by a
    constant factor; the last is open.

    Args:
        offset: position that is read minus position that reads, int32, any shape.
        both_directions: the encoder gives half of all buckets to what comes after.
            Without, everything after shares bucket 0 (it is masked anyway).
        buckets: how many there are.
        max_distance: where the last would end, were it not open.

    Returns:
        int32, of the shape of `offset`.
    """
    if both_directions:
        buckets //= 2
        after = jnp.where(offset > 0, buckets, 0)
        distance = jnp.abs(offset)
    else:
        after, distance = 0, jnp.maximum(-offset, 0)
    # The bounds are found once, in float64, and distances are compared with integers:
    # a logarithm on the device could fall on either side of a bound.
    exact = buckets // 2
    steps = np.arange(1, buckets - exact) / (buckets - exact)
    bounds = np.ceil(exact * (max_distance / exact) ** steps - 1e-9).astype(np.int32)
    wide = exact + (distance[..., None] >= bounds).sum(axis=-1, dtype=jnp.int32)
    return after + jnp.where(distance < exact, distance, wide).astype(jnp.int32)


class Attention(nnx.Module):
    """The four kernels of an attention: q, k, v (W, H D) and o (H D, W)."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        """Samples the kernels.

        T5 does not scale its scores: the smaller q makes up for it at the start.
        """
        width, inner = config.width, config.heads * config.head_width
        self.config = config
        q_std = (width * config.head_width) ** -0.5
        self.q = _linear(width, inner, q_std, config, rngs)
        self.k = _linear(width, inner, width**-0.5, config, rngs)
        self.v = _linear(width, inner, width**-0.5, config, rngs)
        self.o = _linear(inner, width, inner**-0.5, config, rngs)

    def __call__(
        self,
        x: Array,
        key: Key,
        cache: Cache,
        biases: Biases,
        index: Array | None = None,
    ) -> tuple[Array, KeysValues]:
        """Attends to `x` itself, or to a cache.

        Args:
            x: the input, (B, T, W).
            key: dropout key of the attention weights.
            cache: keys and values (B, S, H, D); None to attend to `x`.
            biases: of the scores.
            index: where in the cache `x` belongs; None if it is complete without.

        Returns:
            (B, T, W), and the keys and values that were read.
        """
        if cache is None:
            cache = self.keys_values(x)
        elif index is not None:
            cache = cache.write(self.keys_values(x), index)
        q = self._heads(self.q(x))
        out = blocks.attend(q, *cache, biases, self.config, key)
        return self.o(out), cache

    def keys_values(self, x: Array) -> KeysValues:
        """Returns what can be read from (B, S, W)."""
        return KeysValues(self._heads(self.k(x)), self._heads(self.v(x)))

    def _heads(self, x: Array) -> Array:
        return x.reshape(*x.shape[:2], self.config.heads, self.config.head_width)


def _gated(gate: Array, x: Array) -> Array:
    return jax.nn.gelu(gate, approximate=True) * x


class FeedForward(nnx.Module):
    """ReLU(x wi) wo, or the gated (GELU(x wi_0) * (x wi_1)) wo of v1.1."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        """Samples the kernels."""
        width, hidden = config.width, config.hidden
        self.config = config
        for name in ("wi_0", "wi_1") if config.gated else ("wi",):
            setattr(self, name, _linear(width, hidden, width**-0.5, config, rngs))
        self.wo = _linear(hidden, width, hidden**-0.5, config, rngs)

    def __call__(self, x: Array, key: Key) -> tuple[Array, None]:
        """Maps (B, T, W) to (B, T, W), each position by itself; nothing is cached."""
        if self.config.gated:
            gated = blocks.recomputed(_gated, self.config)
            x = gated(self.wi_0(x), self.wi_1(x))
        else:
            x = jax.nn.relu(self.wi(x))
        return self.wo(blocks.dropout(x, self.config.dropout, key)), None


class Sublayer(nnx.Module):
    """An attention or a feed-forward part, behind a norm and around a residual."""

    def __init__(self, name: str, part: nnx.Module, config: T5Config):
        """Takes over the part, as an attribute called `name`."""
        self.name, self.config = name, config
        setattr(self, name, part)
        self.layer_norm = RMSNorm(config)

    def __call__(self, x: Array, key: Key, *inputs: Any) -> tuple[Array, Cache]:
        """Maps (B, T, W) to (B, T, W), and what the part read; it gets `inputs`."""
        keys = blocks.split_key(key, 2)
        part = getattr(self, self.name)
        normed = blocks.recomputed(self.layer_norm, self.config)(x)
        out, read = part(normed, keys[0], *inputs)
        return x + blocks.dropout(out, self.config.dropout, keys[1]), read


class Block(nnx.Module):
    """Self-attention, in the decoder attention to the source, and feed-forward."""

    def __init__(self, config: T5Config, decoder: bool, *, rngs: nnx.Rngs):
        """Builds the parts of one block."""
        layers = [Sublayer("SelfAttention", Attention(config, rngs=rngs), config)]
        if decoder:
            cross = Attention(config, rngs=rngs)
            layers.append(Sublayer("EncDecAttention", cross, config))
        part = FeedForward(config, rngs=rngs)
        self.layer = nnx.List([*layers, Sublayer("DenseReluDense", part, config)])

    def __call__(
        self,
        x: Array,
        key: Key,
        cache: Cache,
        cross: Cache,
        biases: Biases,
        index: Array | None,
        source: tuple[Array | None, Biases] | None,
    ) -> tuple[Array, Cache]:
        """Maps (B, T, W) to (B, T, W), and the cache.

        Args:
            x: the input, (B, T, W).
            key: dropout key.
            cache: keys and values of the positions before, if decoding.
            cross: keys and values of the source, if they are there already.
            biases: of the self-attention.
            index: where in the cache `x` belongs.
            source: in the decoder the encoded source (B, S, W) and what hides its
                padding.
        """
        keys = blocks.split_key(key, 3)
        x, read = self.layer[0](x, keys[0], cache, biases, index)
        if source is not None:
            encoded, padding = source
            if cross is None:
                cross = self.layer[1].EncDecAttention.keys_values(encoded)
            x, _ = self.layer[1](x, keys[1], cross, padding)
        x, _ = self.layer[-1](x, keys[2])
        return x, None if cache is None else read


class Stack(nnx.Module):
    """The encoder or the decoder, without its embedding."""

    def __init__(self, config: T5Config, decoder: bool, *, rngs: nnx.Rngs):
        """Builds the blocks."""
        self.config = config
        self.decoder = decoder
        self.layers = config.decoder_layers if decoder else config.layers
        self.relative_attention_bias = blocks.embed(
            config.buckets, config.heads, config.width**-0.5, config, rngs
        )
        make = functools.partial(Block, config, decoder, rngs=rngs)
        self.block = blocks.build(make, self.layers, config.scan)
        self.final_layer_norm = RMSNorm(config)

    def __call__(
        self,
        x: Array,
        biases: Biases,
        key: Key = None,
        state: DecodeState | None = None,
        encoded: Array | None = None,
    ) -> tuple[Array, Cache]:
        """Maps embeddings to (B, T, W), and the cache.

        Args:
            x: the embeddings, (B, T, W).
            biases: of the self-attention.
            key: dropout key.
            state: of the decoder; None for the encoder.
            encoded: the source (B, S, W), if its keys and values are not in `state`.
        """
        config = self.config
        cache, cross, index, source = None, None, None, None
        if state is not None:
            cache, cross, mask, index = state
            source = encoded, (blocks.mask_bias(~mask[:, None, None]),)
        keys = blocks.split_key(key, 3)
        layer_keys = None if key is None else jax.random.split(keys[1], self.layers)

        def apply(block: Block, x: Array, *layer: Any) -> tuple[Array, Cache]:
            return block(x, *layer, biases, index, source)

        x = blocks.dropout(x, config.dropout, keys[0])
        layers = (layer_keys, cache, cross)
        x, cache = blocks.run(self.block, apply, x, layers, config.remat)
        return blocks.dropout(self.final_layer_norm(x), config.dropout, keys[2]), cache

    def position_bias(self, queries: Array, keys: Array) -> Array:
        """Returns the learned bias (1, H, T, S) of positions (T,) to positions (S,)."""
        config = self.config
        sizes = {"buckets": config.buckets, "max_distance": config.max_distance}
        offset = keys - queries[:, None]
        buckets = bucket_of(offset, both_directions=not self.decoder, **sizes)
        table = self.relative_attention_bias.embedding[...]  # float32, as the scores
        return jnp.take(table, buckets, axis=0).transpose(2, 0, 1)[None]

    def causal_biases(self, queries: Array, keys: Array) -> Biases:
        """Returns that bias, and the one that masks every later position."""
        later = (keys > queries[:, None])[None, None]
        return self.position_bias(queries, keys), blocks.mask_bias(later)

    def cross_keys_values(self, encoded: Array) -> KeysValues:
        """Returns keys and values of the source for every block of the decoder."""

        def apply(block: Block, x: Array) -> tuple[Array, KeysValues]:
            return x, block.layer[1].EncDecAttention.keys_values(x)

        return blocks.run(self.block, apply, encoded)[1]


class T5(nnx.Module):
    """The model: source and target tokens in, logits of the target out."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        """Builds the model and initializes its parameters."""
        self.config = config
        self.shared = blocks.embed(config.vocab_size, config.width, 1.0, config, rngs)
        self.encoder = Stack(config, decoder=False, rngs=rngs)
        self.decoder = Stack(config, decoder=True, rngs=rngs)
        if not config.tied:
            sizes, std = (config.width, config.vocab_size), config.width**-0.5
            exact = {"preferred_element_type": jnp.float32}
            self.lm_head = _linear(*sizes, std, config, rngs, **exact)

    def __call__(self, source: Array, decoder_input: Array, key: Key = None) -> Array:
        """Predicts the target.

        Args:
            source: ids, (B, S); `PAD` marks padding.
            decoder_input: the target shifted to the right, (B, T).
            key: dropout key; None drops nothing.

        Returns:
            float32 logits (B, T, V).
        """
        return self.logits(self._hidden(source, decoder_input, key))

    def _hidden(self, source: Array, decoder_input: Array, key: Key) -> Array:
        """Maps tokens to what `logits` takes, (B, T, W)."""
        keys = blocks.split_key(key, 2)
        encoded = self.encode(source, keys[0])
        positions = jnp.arange(decoder_input.shape[1])
        biases = self.decoder.causal_biases(positions, positions)
        state = DecodeState(None, None, source != PAD, None)
        x = self.shared(decoder_input)
        return self.decoder(x, biases, keys[1], state, encoded)[0]

    def encode(self, source: Array, key: Key = None) -> Array:
        """Maps source tokens (B, S) to their encodings (B, S, W)."""
        positions = jnp.arange(source.shape[1])
        bias = self.encoder.position_bias(positions, positions)
        # Apart from the mask, which differs between examples: it has no batch axis.
        biases = bias, blocks.mask_bias((source == PAD)[:, None, None])
        return self.encoder(self.shared(source), biases, key)[0]

    def training(self, batch: Batch, key: Key = None) -> tuple[Array, Array, Array]:
        """Reads a batch, to predict each target token from what is before it.

        Args:
            batch: "source" (B, S) and "target" (B, T), filled up with `PAD`.
            key: dropout key; None drops nothing.

        Returns:
            What `logits` takes (B, T, W), labels (B, T), and weights (B, T), 0 for
            padding.
        """
        target = batch["target"]
        shifted = jnp.pad(target[:, :-1], ((0, 0), (1, 0)), constant_values=PAD)
        weights = (target != PAD).astype(jnp.float32)
        return self._hidden(batch["source"], shifted, key), target, weights

    def start(self, batch: Batch, length: int) -> tuple[Array, DecodeState]:
        """Encodes "source" (B, S) and makes room for `length` tokens.

        Returns:
            Logits (B, V) of the first token to generate, and the state after it.
        """
        source = batch["source"]
        rows, config = len(source), self.config
        cross = self.decoder.cross_keys_values(self.encode(source))
        heads = (config.heads, config.head_width)
        shape = (config.decoder_layers, rows, length, *heads)
        cache = KeysValues.zeros(shape, config.dtype)
        state = DecodeState(cache, cross, source != PAD, jnp.int32(0))
        return self.step(state, jnp.full(rows, PAD))

    def step(self, state: DecodeState, tokens: Array) -> tuple[Array, DecodeState]:
        """Reads one more token per row, (B,): the logits (B, V) after it, the state."""
        slots = jnp.arange(state.cache.k.shape[2])
        biases = self.decoder.causal_biases(state.index[None], slots)
        x, cache = self.decoder(self.shared(tokens[:, None]), biases, state=state)
        state = state._replace(cache=cache, index=state.index + 1)
        return self.logits(x)[:, 0], state

    def logits(self, x: Array) -> Array:
        """Maps the decoder's output (B, T, W) to float32 logits (B, T, V)."""
        if self.config.tied:
            return blocks.logits_of(x * self.config.width**-0.5, self.shared)
        return self.lm_head(x)
