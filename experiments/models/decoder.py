"""What decoder-only models share: training, and decoding with a cache.

In the shapes below B is the batch, T the tokens in an example, W the width, L the
length of the cache and V the vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from experiments.models import blocks
from experiments.models.blocks import Batch, Cache, DecodeState, Key, KeysValues


class Places:
    """Positions of tokens, and what each may attend to.

    Attributes:
        positions: int32, (B, T): padding on the left does not count.
        bias: `MASKED` where a position must not be read, (B, 1, T, T or L).
        index: where in the cache the first token belongs.
    """

    def __init__(self, tokens: int, mask: Array, index: Array):
        """Of tokens that stand from `index` on in a mask (B, L)."""
        slots = index + jnp.arange(tokens)
        causal = jnp.arange(mask.shape[1]) <= slots[:, None]
        readable = causal & mask[:, None, None, :]
        self.bias = blocks.mask_bias(~readable)
        # Padding on the left does not count as a position; its own are not read.
        self.positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)[:, slots]
        self.index = index


def attend(
    q: Array, k: Array, v: Array, cache: Cache, places: Places, config: Any, key: Key
) -> tuple[Array, Cache]:
    """Attention to the tokens themselves, or to the cache after they are written to it.

    Args:
        q: queries (B, T, H, D).
        k: keys (B, T, K, D); each for H / K queries.
        v: values (B, T, K, D).
        cache: keys and values of the positions before, if decoding.
        places: where the tokens stand.
        config: whose dropout the attention weights have.
        key: its key.

    Returns:
        (B, T, H * D), and the cache.
    """
    if cache is not None:
        k, v = cache = cache.write(KeysValues(k, v), places.index)
    # The scale goes on q, which is smaller than the (T, T) scores.
    q = q * q.shape[-1] ** -0.5
    return blocks.attend(q, k, v, (places.bias,), config, key), cache


class Decoder(nnx.Module):
    """A language model: token ids in, logits of the next token out.

    Subclasses have `_blocks`, which take an input (B, T, W), a dropout key, a cache and
    `Places`, and `_embed` and `logits`.
    """

    config: Any

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
        return self.logits(self._hidden(tokens, mask, key))

    def _hidden(
        self, tokens: Array, mask: Array | None = None, key: Key = None
    ) -> Array:
        """Maps tokens (B, T) to what `logits` takes, (B, T, W)."""
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        state = DecodeState(None, None, mask, jnp.int32(0))
        return self._run(tokens, state, key)[0]

    def training(self, batch: Batch, key: Key = None) -> tuple[Array, Array, Array]:
        """Reads a batch, to predict each token from those before it.

        Args:
            batch: "tokens" (B, T + 1) and, if not all labels count alike, float32
                "weights" (B, N), of N = T labels or of N from int "first" (B,) on.
            key: dropout key; None drops nothing.

        Returns:
            What `logits` takes (B, N, W), labels (B, N) and weights (B, N).
        """
        tokens = batch["tokens"]
        x, labels = self._hidden(tokens[:, :-1], key=key), tokens[:, 1:]
        weights = batch.get("weights", jnp.ones(labels.shape, jnp.float32))
        if "first" in batch:  # No logits of the prompt, which nobody asks for.
            at = batch["first"][:, None] + jnp.arange(weights.shape[1])
            x = jnp.take_along_axis(x, at[..., None], axis=1)
            labels = jnp.take_along_axis(labels, at, axis=1)
        return x, labels, weights

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
        shape = (config.layers, *mask.shape, config.kv_heads, config.head_width)
        cache = KeysValues.zeros(shape, config.dtype)
        state = DecodeState(cache, None, mask, jnp.int32(0))
        return self._extend(state, batch["prompt"])

    def step(self, state: DecodeState, tokens: Array) -> tuple[Array, DecodeState]:
        """Reads one more token per row, (B,): the logits (B, V) after it, the state."""
        return self._extend(state, tokens[:, None])

    def _extend(self, state: DecodeState, tokens: Array) -> tuple[Array, DecodeState]:
        x, cache = self._run(tokens, state)
        state = state._replace(cache=cache, index=state.index + tokens.shape[1])
        return self.logits(x[:, -1:])[:, 0], state

    def _run(
        self, tokens: Array, state: DecodeState, key: Key = None
    ) -> tuple[Array, Cache]:
        """Runs the blocks on tokens (B, T) that stand from `index` on in the mask."""
        config, (cache, _, mask, index) = self.config, state
        places = Places(tokens.shape[1], mask, index)
        keys = blocks.split_key(key, 2)
        layer_keys = None if key is None else jax.random.split(keys[1], config.layers)
        x = self._embed(tokens, places)
        x = blocks.dropout(x, config.dropout, keys[0])

        def apply(block: Any, x: Array, *layer: Any) -> tuple[Array, Cache]:
            return block(x, *layer, places)

        return blocks.run(self._blocks, apply, x, (layer_keys, cache), config.remat)
