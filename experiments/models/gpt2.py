"""GPT-2 (Radford et al., 2019) in Flax NNX.

Pre-norm blocks, learned positions, GELU in its tanh form, tied embeddings. Modules
are named as in Hugging Face's `GPT2Model` and their parameters have its shapes, so
that loading a checkpoint is a renaming. The one difference is the last word of a name,
where Flax says `kernel`, `scale` or `embedding`.

In the shapes below B is the batch, T the tokens in an example, W the width, H the
heads, L the length of the cache and V the vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from experiments.models import blocks
from experiments.models.blocks import Batch, Cache, DecodeState, Key, KeysValues
from experiments.models.config import GPT2Config

_STD = 0.02


def _residual_std(config: GPT2Config) -> float:
    # Every block adds to the residual stream twice; the scale keeps its variance
    # independent of the depth.
    return _STD / (2 * config.layers) ** 0.5


def _norm(config: GPT2Config, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # Two passes for the variance: trained GPT-2s have a few channels with large means,
    # where the mean of the squares minus the squared mean cancels.
    options = {"epsilon": 1e-5, "use_fast_variance": False, "dtype": config.dtype}
    return nnx.LayerNorm(config.width, rngs=rngs, **options)


class Attention(nnx.Module):
    """Self-attention with one fused kernel (W, 3W) for q, k and v."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        """Samples the two kernels."""
        width = config.width
        self.config = config
        self.c_attn = blocks.linear(width, 3 * width, _STD, config, rngs)
        self.c_proj = blocks.linear(width, width, _residual_std(config), config, rngs)

    def __call__(
        self, x: Array, key: Key, cache: Cache, bias: Array, index: Array
    ) -> tuple[Array, Cache]:
        """Attends to `x` itself, or to the cache after `x` was written into it.

        Args:
            x: the input, (B, T, W).
            key: dropout key of the attention weights.
            cache: keys and values of the positions before, if decoding.
            bias: `MASKED` where a position must not be read, (B, 1, T, T or L).
            index: where in the cache `x` belongs.

        Returns:
            (B, T, W), and the cache.
        """
        config = self.config
        q, k, v = (
            part.reshape(*part.shape[:2], config.heads, -1)
            for part in jnp.split(self.c_attn(x), 3, axis=-1)
        )
        if cache is not None:
            k, v = cache = cache.write(KeysValues(k, v), index)
        # The scale goes on q, which is smaller than the (T, T) scores.
        q = q * q.shape[-1] ** -0.5
        out = blocks.attend(q, k, v, bias, config.dropout, key)
        return self.c_proj(out), cache


class MLP(nnx.Module):
    """Two layers, four times as wide inside."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        """Samples the two kernels."""
        width, std = config.width, _residual_std(config)
        self.c_fc = blocks.linear(width, 4 * width, _STD, config, rngs)
        self.c_proj = blocks.linear(4 * width, width, std, config, rngs)

    def __call__(self, x: Array) -> Array:
        """Maps (B, T, W) to (B, T, W), each position by itself."""
        # The tanh form is what GPT-2 was trained with ("gelu_new").
        return self.c_proj(jax.nn.gelu(self.c_fc(x), approximate=True))


class Block(nnx.Module):
    """Attention and MLP, each behind a layer norm and around a residual."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        """Builds the parts of one block."""
        self.rate = config.dropout
        self.ln_1 = _norm(config, rngs)
        self.attn = Attention(config, rngs=rngs)
        self.ln_2 = _norm(config, rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self, x: Array, key: Key, cache: Cache, bias: Array, index: Array
    ) -> tuple[Array, Cache]:
        """Maps (B, T, W) to (B, T, W), and the cache; see `Attention`."""
        keys = blocks.split_key(key, 3)
        mixed, cache = self.attn(self.ln_1(x), keys[0], cache, bias, index)
        x = x + blocks.dropout(mixed, self.rate, keys[1])
        return x + blocks.dropout(self.mlp(self.ln_2(x)), self.rate, keys[2]), cache


class GPT2(nnx.Module):
    """The language model: token ids in, logits of the next token out."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        """Builds the model and initializes its parameters."""
        self.config = config
        self.wte = blocks.embed(config.vocab_size, config.width, _STD, config, rngs)
        self.wpe = blocks.embed(config.context, config.width, _STD, config, rngs)
        make = functools.partial(Block, config, rngs=rngs)
        self.h = blocks.build(make, config.layers, config.scan)
        self.ln_f = _norm(config, rngs)

    def __call__(
        self, tokens: Array, mask: Array | None = None, key: Key = None
    ) -> Array:
        """Predicts the token after each position.

        Args:
            tokens: ids, (B, T).
            mask: bool, (B, T): False where a token is padding, on either side.
            key: dropout key; None drops nothing.

        Returns:
            float32 logits (B, T, V).
        """
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        state = DecodeState(None, None, mask, jnp.int32(0))
        return self._logits(self._run(tokens, state, key)[0])

    def training(self, batch: Batch, key: Key = None) -> tuple[Array, Array, Array]:
        """Predicts each token of a batch from those before it.

        Args:
            batch: "tokens" (B, T + 1) and, if not all labels count alike, float32
                "weights" (B, T).
            key: dropout key; None drops nothing.

        Returns:
            Logits (B, T, V), labels (B, T) and weights (B, T).
        """
        tokens = batch["tokens"]
        labels = tokens[:, 1:]
        weights = batch.get("weights", jnp.ones(labels.shape, jnp.float32))
        return self(tokens[:, :-1], key=key), labels, weights

    def start(self, batch: Batch, length: int) -> tuple[Array, DecodeState]:
        """Reads the prompt and makes room for `length` tokens.

        Args:
            batch: "prompt" (B, S), padded on the left, and "prompt_mask", bool (B, S).
            length: how many tokens will follow.

        Returns:
            Logits (B, V) of the first token to generate, and the state after it.

        Raises:
            ValueError: prompt and tokens together are longer than the context.
        """
        rows, prompt = batch["prompt"].shape
        config = self.config
        if prompt + length > config.context:
            raise ValueError(
                f"`length` must leave room for the prompt in the context of "
                f"{config.context} tokens, got {length} after a prompt of {prompt}; "
                f"at most {config.context - prompt} fit"
            )
        mask = jnp.ones((rows, length), bool)
        mask = jnp.concatenate([batch["prompt_mask"], mask], axis=1)
        head_width = config.width // config.heads
        shape = (config.layers, *mask.shape, config.heads, head_width)
        cache = KeysValues.zeros(shape, config.dtype)
        state = DecodeState(cache, None, mask, jnp.int32(0))
        return self._extend(state, batch["prompt"])

    def step(self, state: DecodeState, tokens: Array) -> tuple[Array, DecodeState]:
        """Reads one more token per row, (B,): the logits (B, V) after it, the state."""
        return self._extend(state, tokens[:, None])

    def _extend(self, state: DecodeState, tokens: Array) -> tuple[Array, DecodeState]:
        x, cache = self._run(tokens, state)
        state = state._replace(cache=cache, index=state.index + tokens.shape[1])
        return self._logits(x[:, -1:])[:, 0], state

    def _run(
        self, tokens: Array, state: DecodeState, key: Key = None
    ) -> tuple[Array, Cache]:
        """Runs the blocks on tokens (B, T) that stand from `index` on in the mask."""
        config, (cache, _, mask, index) = self.config, state
        slots = index + jnp.arange(tokens.shape[1])
        causal = jnp.arange(mask.shape[1]) <= slots[:, None]
        readable = causal & mask[:, None, None, :]  # (B, 1, T, L)
        bias = jnp.where(readable, 0, blocks.MASKED)
        # Padding on the left does not count as a position; its own are not read.
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)[:, slots]
        keys = blocks.split_key(key, 2)
        layer_keys = None if key is None else jax.random.split(keys[1], config.layers)
        x = self.wte(tokens) + self.wpe(positions)
        x = blocks.dropout(x, config.dropout, keys[0])

        def apply(block: Block, x: Array, *layer: Any) -> tuple[Array, Cache]:
            return block(x, *layer, bias, index)

        return blocks.run(self.h, apply, x, (layer_keys, cache), config.remat)

    def _logits(self, x: Array) -> Array:
        return blocks.logits_of(self.ln_f(x), self.wte)
