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

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models import blocks
from experiments.models.blocks import DecodeState, Key, KeysValues
from experiments.models.config import T5Config
from experiments.models.t5_layers import (
    CrossAttentionLayer,
    FeedForwardLayer,
    RMSNorm,
    SelfAttentionLayer,
    bucket_of,
)

PAD = 0
"""Token that fills up sources and targets, and that starts the decoder."""

Batch = dict[str, jax.Array]


class Block(nnx.Module):
    """Self-attention, in the decoder attention to the source, and feed-forward."""

    def __init__(self, config: T5Config, decoder: bool, *, rngs: nnx.Rngs):
        """Builds the parts of one block."""
        layers = [SelfAttentionLayer(config, rngs=rngs)]
        if decoder:
            layers.append(CrossAttentionLayer(config, rngs=rngs))
        self.layer = nnx.List([*layers, FeedForwardLayer(config, rngs=rngs)])

    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array,
        key: Key,
        cache: KeysValues | None,
        index: jax.Array | None,
        cross: KeysValues | None,
        source: tuple[jax.Array, jax.Array] | None,
    ) -> tuple[jax.Array, KeysValues | None]:
        """Maps (B, T, W) to (B, T, W), and the cache.

        Args:
            x: the input, (B, T, W).
            bias: bias of the self-attention, (B or 1, H, T, T or L).
            key: dropout key.
            cache: keys and values of the positions before, if decoding.
            index: where in the cache `x` belongs.
            cross: keys and values of the source, if they are there already.
            source: in the decoder the encoded source (B, S, W) and the bias that hides
                its padding (B, 1, 1, S).
        """
        keys = blocks.split_key(key, 3)
        x, cache = self.layer[0](x, bias, keys[0], cache, index)
        if source is not None:
            x = self.layer[1](x, *source, keys[1], cross)
        return self.layer[-1](x, keys[2]), cache


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
        self.block = blocks.build(
            lambda: Block(config, decoder, rngs=rngs), self.layers, config.scan
        )
        self.final_layer_norm = RMSNorm(config, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array,
        key: Key = None,
        cache: KeysValues | None = None,
        index: jax.Array | None = None,
        cross: KeysValues | None = None,
        source: tuple[jax.Array, jax.Array] | None = None,
    ) -> tuple[jax.Array, KeysValues | None]:
        """Maps embeddings (B, T, W) to (B, T, W), and the caches; see `Block`."""
        rate = self.config.dropout
        keys = blocks.split_key(key, 3)
        layer_keys = None if key is None else jax.random.split(keys[1], self.layers)
        x, cache = blocks.run(
            self.block,
            lambda block, x, key, cache, cross: block(
                x, bias, key, cache, index, cross, source
            ),
            blocks.dropout(x, rate, keys[0]),
            (layer_keys, cache, cross),
            self.config.remat,
        )
        return blocks.dropout(self.final_layer_norm(x), rate, keys[2]), cache

    def position_bias(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """Returns the learned bias (1, H, T, S) of positions (T,) to positions (S,)."""
        config = self.config
        buckets = bucket_of(
            keys - queries[:, None],
            both_directions=not self.decoder,
            buckets=config.buckets,
            max_distance=config.max_distance,
        )
        table = self.relative_attention_bias.embedding[...]  # float32, as the scores
        return jnp.take(table, buckets, axis=0).transpose(2, 0, 1)[None]

    def causal_bias(self, queries: jax.Array, keys: jax.Array) -> jax.Array:
        """Returns the same, with every later position hidden."""
        bias = self.position_bias(queries, keys)
        return jnp.where(keys <= queries[:, None], bias, blocks.MASKED)

    def cross_keys_values(self, encoded: jax.Array) -> KeysValues:
        """Returns keys and values of the source for every block of the decoder."""
        return blocks.run(
            self.block,
            lambda block, x, _: (x, block.layer[1].EncDecAttention.keys_values(x)),
            encoded,
            (None,),
        )[1]


class T5(nnx.Module):
    """The model: source and target tokens in, logits of the target out."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        """Builds the model and initializes its parameters."""
        self.config = config
        self.shared = blocks.embed(config.vocab_size, config.width, 1.0, config, rngs)
        self.encoder = Stack(config, decoder=False, rngs=rngs)
        self.decoder = Stack(config, decoder=True, rngs=rngs)
        if not config.tied:
            self.lm_head = blocks.linear(
                config.width,
                config.vocab_size,
                config.width**-0.5,
                config,
                rngs,
                use_bias=False,
                preferred_element_type=jnp.float32,
            )

    def __call__(
        self, source: jax.Array, decoder_input: jax.Array, key: Key = None
    ) -> jax.Array:
        """Predicts the target.

        Args:
            source: ids, (B, S); `PAD` marks padding.
            decoder_input: the target shifted to the right, (B, T).
            key: dropout key; None drops nothing.

        Returns:
            float32 logits (B, T, V).
        """
        keys = blocks.split_key(key, 2)
        encoded = self.encode(source, keys[0])
        positions = jnp.arange(decoder_input.shape[1])
        x, _ = self.decoder(
            self.shared(decoder_input),
            self.decoder.causal_bias(positions, positions),
            keys[1],
            source=(encoded, _source_bias(source != PAD)),
        )
        return self._logits(x)

    def encode(self, source: jax.Array, key: Key = None) -> jax.Array:
        """Maps source tokens (B, S) to their encodings (B, S, W)."""
        positions = jnp.arange(source.shape[1])
        bias = self.encoder.position_bias(positions, positions)
        bias = jnp.where((source != PAD)[:, None, None], bias, blocks.MASKED)
        return self.encoder(self.shared(source), bias, key)[0]

    def training(
        self, batch: Batch, key: Key = None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Predicts each target token from the source and the target before it.

        Args:
            batch: "source" (B, S) and "target" (B, T), filled up with `PAD`.
            key: dropout key; None drops nothing.

        Returns:
            Logits (B, T, V), labels (B, T) and weights (B, T), 0 for padding.
        """
        target = batch["target"]
        shifted = jnp.pad(target[:, :-1], ((0, 0), (1, 0)), constant_values=PAD)
        weights = (target != PAD).astype(jnp.float32)
        return self(batch["source"], shifted, key), target, weights

    def start(self, batch: Batch, length: int) -> tuple[jax.Array, DecodeState]:
        """Encodes "source" (B, S) and makes room for `length` tokens.

        Returns:
            Logits (B, V) of the first token to generate, and the state after it.
        """
        source = batch["source"]
        rows, config = len(source), self.config
        cross = self.decoder.cross_keys_values(self.encode(source))
        shape = (
            config.decoder_layers,
            rows,
            length,
            config.heads,
            config.head_width,
        )
        cache = KeysValues.zeros(shape, config.dtype)
        state = DecodeState(cache, cross, source != PAD, jnp.int32(0))
        return self.step(state, jnp.full(rows, PAD))

    def step(
        self, state: DecodeState, tokens: jax.Array
    ) -> tuple[jax.Array, DecodeState]:
        """Reads one more token per row, (B,): the logits (B, V) after it, the state."""
        slots = jnp.arange(state.cache.k.shape[2])
        x, cache = self.decoder(
            self.shared(tokens[:, None]),
            self.decoder.causal_bias(state.index[None], slots),
            cache=state.cache,
            index=state.index,
            cross=state.cross,
            source=(None, _source_bias(state.mask)),
        )
        state = state._replace(cache=cache, index=state.index + 1)
        return self._logits(x)[:, 0], state

    def _logits(self, x: jax.Array) -> jax.Array:
        if self.config.tied:
            return blocks.logits_of(x * self.config.width**-0.5, self.shared)
        return self.lm_head(x)


def _source_bias(mask: jax.Array) -> jax.Array:
    return jnp.where(mask, 0, blocks.MASKED)[:, None, None]
