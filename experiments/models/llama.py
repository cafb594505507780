"""Llama (Touvron et al., 2023) in Flax NNX, as of Llama 2, Llama 3 and SmolLM2.

Pre-norm blocks with RMS norms, rotary positions, gated SiLU layers, queries in groups
that share keys and values, and no biases. Modules are named as in Hugging Face's
`LlamaModel`; kernels are (in, out).

In the shapes below B is the batch, T the tokens in an example, W the width, H the heads
and D the width of a head.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from experiments.models import blocks
from experiments.models.blocks import Cache, Key
from experiments.models.config import LlamaConfig
from experiments.models.decoder import Decoder, Places, attend

_STD = 0.02


def _linear(n_in: int, n_out: int, config: LlamaConfig, rngs: nnx.Rngs) -> nnx.Linear:
    return blocks.linear(n_in, n_out, _STD, config, rngs, use_bias=False)


def _norm(config: LlamaConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    options = {"epsilon": config.epsilon, "dtype": config.dtype}
    return nnx.RMSNorm(config.width, rngs=rngs, **options)


def rotated(x: Array, positions: Array, base: float) -> Array:
    """Turns pairs of entries by angles that grow with the position.

    Entry i of the first half of a head and entry i of the second are a pair, turned by
    position / base**(2 i / D).

    Args:
        x: queries or keys, (B, T, H, D).
        positions: int32, (B, T).
        base: of the angles.

    Returns:
        The same shape and dtype.
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None] * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _gated(gate: Array, up: Array) -> Array:
    return jax.nn.silu(gate) * up


class Attention(nnx.Module):
    """Self-attention in which groups of heads share keys and values."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        """Samples the four kernels."""
        width, shared = config.width, config.kv_heads * config.head_width
        self.config = config
        self.q_proj = _linear(width, width, config, rngs)
        self.k_proj = _linear(width, shared, config, rngs)
        self.v_proj = _linear(width, shared, config, rngs)
        self.o_proj = _linear(width, width, config, rngs)

    def __call__(
        self, x: Array, key: Key, cache: Cache, places: Places
    ) -> tuple[Array, Cache]:
        """Maps (B, T, W) to (B, T, W), and the cache; see `attend`."""
        config = self.config
        q, k, v = (
            kernel(x).reshape(*x.shape[:2], -1, config.head_width)
            for kernel in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (rotated(y, places.positions, config.rope_base) for y in (q, k))
        out, cache = attend(q, k, v, cache, places, config, key)
        return self.o_proj(out), cache


class MLP(nnx.Module):
    """A gated layer: silu(x G) * (x U), and back to the width."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        """Samples the three kernels."""
        width, hidden = config.width, config.hidden
        self.config = config
        self.gate_proj = _linear(width, hidden, config, rngs)
        self.up_proj = _linear(width, hidden, config, rngs)
        self.down_proj = _linear(hidden, width, config, rngs)

    def __call__(self, x: Array) -> Array:
        """Maps (B, T, W) to (B, T, W), each position by itself."""
        gated = blocks.recomputed(_gated, self.config)
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


class Block(nnx.Module):
    """Attention and MLP, each behind an RMS norm and around a residual."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        """Builds the parts of one block."""
        self.config = config
        self.input_layernorm = _norm(config, rngs)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = _norm(config, rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self, x: Array, key: Key, cache: Cache, places: Places
    ) -> tuple[Array, Cache]:
        """Maps (B, T, W) to (B, T, W), and the cache; see `Attention`."""
        keys, rate = blocks.split_key(key, 3), self.config.dropout
        normed = blocks.recomputed(self.input_layernorm, self.config)(x)
        mixed, cache = self.self_attn(normed, keys[0], cache, places)
        x = x + blocks.dropout(mixed, rate, keys[1])
        normed = blocks.recomputed(self.post_attention_layernorm, self.config)(x)
        return x + blocks.dropout(self.mlp(normed), rate, keys[2]), cache


class Llama(Decoder):
    """The language model: token ids in, logits of the next token out."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        """Builds the model and initializes its parameters."""
        self.config = config
        table = config.vocab_size, config.width
        self.embed_tokens = blocks.embed(*table, _STD, config, rngs)
        make = functools.partial(Block, config, rngs=rngs)
        self.layers = blocks.build(make, config.layers, config.scan)
        self.norm = _norm(config, rngs)
        if not config.tied:
            self.lm_head = _linear(config.width, config.vocab_size, config, rngs)

    @property
    def _blocks(self) -> nnx.Module:
        return self.layers

    def _embed(self, tokens: Array, places: Places) -> Array:
        del places
        return self.embed_tokens(tokens)

    def logits(self, x: Array) -> Array:
        """Maps the output of the last block (B, T, W) to float32 logits (B, T, V)."""
        x = self.norm(x)
        if self.config.tied:
            return blocks.logits_of(x, self.embed_tokens)
        weights = self.lm_head.kernel[...].astype(x.dtype)
        return jnp.einsum("btw,wv->btv", x, weights, preferred_element_type=jnp.float32)
