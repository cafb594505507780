"""GPT-2 (Radford et al., 2019) in Flax NNX.

Pre-norm blocks, learned positions, GELU in its tanh form, tied embeddings. Modules
are named as in Hugging Face's `GPT2Model` and their parameters have its shapes, so
that loading a checkpoint is a renaming. The one difference is the last word of a name,
where Flax says `kernel`, `scale` or `embedding`.

In the shapes below B is the batch, T the tokens in an example, W the width, H the
heads, L the length of the cache and V the vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from experiments.models import blocks
from experiments.models.blocks import Cache, Key
from experiments.models.config import GPT2Config
from experiments.models.decoder import Decoder, Places, attend

_STD = 0.02


# The tanh form is what GPT-2 was trained with ("gelu_new").
_gelu = functools.partial(jax.nn.gelu, approximate=True)


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
        self, x: Array, key: Key, cache: Cache, places: Places
    ) -> tuple[Array, Cache]:
        """Maps (B, T, W) to (B, T, W), and the cache; see `attend`."""
        config = self.config
        q, k, v = (
            part.reshape(*part.shape[:2], config.heads, -1)
            for part in jnp.split(self.c_attn(x), 3, axis=-1)
        )
        out, cache = attend(q, k, v, cache, places, config, key)
        return self.c_proj(out), cache


class MLP(nnx.Module):
    """Two layers, four times as wide inside."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        """Samples the two kernels."""
        self.config = config
        width, std = config.width, _residual_std(config)
        self.c_fc = blocks.linear(width, 4 * width, _STD, config, rngs)
        self.c_proj = blocks.linear(4 * width, width, std, config, rngs)

    def __call__(self, x: Array) -> Array:
        """Maps (B, T, W) to (B, T, W), each position by itself."""
        return self.c_proj(blocks.recomputed(_gelu, self.config)(self.c_fc(x)))


class Block(nnx.Module):
    """Attention and MLP, each behind a layer norm and around a residual."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        """Builds the parts of one block."""
        self.config = config
        self.ln_1 = _norm(config, rngs)
        self.attn = Attention(config, rngs=rngs)
        self.ln_2 = _norm(config, rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self, x: Array, key: Key, cache: Cache, places: Places
    ) -> tuple[Array, Cache]:
        """Maps (B, T, W) to (B, T, W), and the cache; see `Attention`."""
        keys, rate = blocks.split_key(key, 3), self.config.dropout
        normed = blocks.recomputed(self.ln_1, self.config)(x)
        mixed, cache = self.attn(normed, keys[0], cache, places)
        x = x + blocks.dropout(mixed, rate, keys[1])
        inner = self.mlp(blocks.recomputed(self.ln_2, self.config)(x))
        return x + blocks.dropout(inner, rate, keys[2]), cache


class GPT2(Decoder):
    """The language model: token ids in, logits of the next token out."""

    def __init__(self, config: GPT2Config, *, rngs: nnx.Rngs):
        """Builds the model and initializes its parameters."""
        self.config = config
        self.wte = blocks.embed(config.vocab_size, config.width, _STD, config, rngs)
        self.wpe = blocks.embed(config.context, config.width, _STD, config, rngs)
        make = functools.partial(Block, config, rngs=rngs)
        self.h = blocks.build(make, config.layers, config.scan)
        self.ln_f = _norm(config, rngs)

    @property
    def _blocks(self) -> nnx.Module:
        return self.h

    def _embed(self, tokens: Array, places: Places) -> Array:
        return self.wte(tokens) + self.wpe(places.positions)

    def logits(self, x: Array) -> Array:
        """Maps the output of the last block (B, T, W) to float32 logits (B, T, V)."""
        return blocks.logits_of(self.ln_f(x), self.wte)
