"""The parts of T5's blocks, each around a residual; the shapes are those of `t5`."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.models import blocks
from experiments.models.blocks import Key, KeysValues
from experiments.models.config import T5Config

_EPSILON = 1e-6


class RMSNorm(nnx.Module):
    """Divides by the root mean square over W; a scale, no mean and no bias."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        """Starts with scales of one."""
        del rngs  # nothing is sampled
        self.scale = nnx.Param(jnp.ones(config.width))
        self.dtype = config.dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, T, W) to (B, T, W), in float32 inside."""
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(x**2, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(mean_square + _EPSILON)
        return (x * self.scale[...]).astype(self.dtype)


def bucket_of(
    offset: jax.Array, *, both_directions: bool, buckets: int, max_distance: int
) -> jax.Array:
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
        shared = {"config": config, "rngs": rngs, "use_bias": False}
        q_std = (width * config.head_width) ** -0.5
        self.q = blocks.linear(width, inner, q_std, **shared)
        self.k = blocks.linear(width, inner, width**-0.5, **shared)
        self.v = blocks.linear(width, inner, width**-0.5, **shared)
        self.o = blocks.linear(inner, width, inner**-0.5, **shared)

    def __call__(
        self, x: jax.Array, read: KeysValues, bias: jax.Array, key: Key
    ) -> jax.Array:
        """Maps queries from (B, T, W) and keys and values (B, S, H, D) to (B, T, W)."""
        q = self._heads(self.q(x))
        return self.o(blocks.attend(q, *read, bias, self.config.dropout, key))

    def keys_values(self, x: jax.Array) -> KeysValues:
        """Returns what can be read from (B, S, W)."""
        return KeysValues(self._heads(self.k(x)), self._heads(self.v(x)))

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.config.heads, self.config.head_width)


class SelfAttentionLayer(nnx.Module):
    """Attention of a sequence to itself."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        """Builds norm and attention."""
        self.rate = config.dropout
        self.SelfAttention = Attention(config, rngs=rngs)
        self.layer_norm = RMSNorm(config, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        bias: jax.Array,
        key: Key,
        cache: KeysValues | None,
        index: jax.Array | None,
    ) -> tuple[jax.Array, KeysValues | None]:
        """Attends to `x` itself, or to the cache after `x` was written into it."""
        keys = blocks.split_key(key, 2)
        normed = self.layer_norm(x)
        read = self.SelfAttention.keys_values(normed)
        if cache is not None:
            read = cache = cache.write(read, index)
        mixed = self.SelfAttention(normed, read, bias, keys[0])
        return x + blocks.dropout(mixed, self.rate, keys[1]), cache


class CrossAttentionLayer(nnx.Module):
    """Attention of the target to the encoded source."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        """Builds norm and attention."""
        self.rate = config.dropout
        self.EncDecAttention = Attention(config, rngs=rngs)
        self.layer_norm = RMSNorm(config, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        encoded: jax.Array | None,
        bias: jax.Array,
        key: Key,
        read: KeysValues | None,
    ) -> jax.Array:
        """Attends to `encoded` (B, S, W), or to the keys and values made from it."""
        keys = blocks.split_key(key, 2)
        if read is None:
            read = self.EncDecAttention.keys_values(encoded)
        mixed = self.EncDecAttention(self.layer_norm(x), read, bias, keys[0])
        return x + blocks.dropout(mixed, self.rate, keys[1])


class FeedForward(nnx.Module):
    """ReLU(x wi) wo, or the gated (GELU(x wi_0) * (x wi_1)) wo of v1.1."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        """Samples the kernels."""
        width, hidden = config.width, config.hidden
        self.rate, self.gated = config.dropout, config.gated
        shared = {"config": config, "rngs": rngs, "use_bias": False}
        for name in ("wi_0", "wi_1") if config.gated else ("wi",):
            setattr(self, name, blocks.linear(width, hidden, width**-0.5, **shared))
        self.wo = blocks.linear(hidden, width, hidden**-0.5, **shared)

    def __call__(self, x: jax.Array, key: Key) -> jax.Array:
        """Maps (B, T, W) to (B, T, W), each position by itself."""
        if self.gated:
            x = jax.nn.gelu(self.wi_0(x), approximate=True) * self.wi_1(x)
        else:
            x = jax.nn.relu(self.wi(x))
        return self.wo(blocks.dropout(x, self.rate, key))


class FeedForwardLayer(nnx.Module):
    """The feed-forward part, behind a norm."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        """Builds norm and feed-forward part."""
        self.rate = config.dropout
        self.DenseReluDense = FeedForward(config, rngs=rngs)
        self.layer_norm = RMSNorm(config, rngs=rngs)

    def __call__(self, x: jax.Array, key: Key) -> jax.Array:
        """Maps (B, T, W) to (B, T, W)."""
        keys = blocks.split_key(key, 2)
        out = self.DenseReluDense(self.layer_norm(x), keys[0])
        return x + blocks.dropout(out, self.rate, keys[1])
