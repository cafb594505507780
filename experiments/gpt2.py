"""GPT-2 (Radford et al., 2019) in Flax NNX, without dropout.

Pre-norm blocks, learned positions, GELU in its tanh form, tied embeddings. Modules
are named as in Hugging Face's `GPT2Model` and their parameters have its shapes, so
that loading a checkpoint is a renaming: see `hugging_face_name`. The one difference is
the last word of a name, where Flax says `kernel`, `scale` or `embedding`.

In the shapes below B is the batch, T the tokens in an example, W the width, H the
heads and V the vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments.config import ModelConfig

_STD = 0.02
_EPSILON = 1e-5  # of the layer norms
_FLAX_WORDS = ("kernel", "scale", "embedding")

Params = dict[str, Any]
"""Nested dicts of arrays; a path in it reads "h/0/attn/c_attn/kernel"."""


def _residual_std(config: ModelConfig) -> float:
    # Every block adds to the residual stream twice; the scale keeps its variance
    # independent of the depth.
    return _STD / (2 * config.layers) ** 0.5


def _linear(n_in: int, n_out: int, std: float, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.normal(std)
    return nnx.Linear(n_in, n_out, kernel_init=init, rngs=rngs)


def _embed(count: int, width: int, rngs: nnx.Rngs) -> nnx.Embed:
    init = nnx.initializers.normal(_STD)
    return nnx.Embed(count, width, embedding_init=init, rngs=rngs)


class Attention(nnx.Module):
    """Causal self-attention with one fused kernel (W, 3W) for q, k and v."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Draws the two kernels."""
        width = config.width
        self.heads = config.heads
        self.c_attn = _linear(width, 3 * width, _STD, rngs)
        self.c_proj = _linear(width, width, _residual_std(config), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, T, W) to (B, T, W); position t reads the positions up to t."""
        batch, length, width = x.shape
        qkv = self.c_attn(x).reshape(batch, length, 3, self.heads, -1)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)  # each (B, H, T, W / H)
        # The scale goes on q, which is smaller than the (T, T) scores.
        scores = (q * q.shape[-1] ** -0.5) @ k.swapaxes(-1, -2)
        causal = jnp.tril(jnp.ones((length, length), bool))
        scores = jnp.where(causal, scores, jnp.finfo(scores.dtype).min)
        out = (jax.nn.softmax(scores) @ v).transpose(0, 2, 1, 3)
        return self.c_proj(out.reshape(batch, length, width))


class MLP(nnx.Module):
    """Two layers, four times as wide inside."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Draws the two kernels."""
        width = config.width
        self.c_fc = _linear(width, 4 * width, _STD, rngs)
        self.c_proj = _linear(4 * width, width, _residual_std(config), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, T, W) to (B, T, W), each position by itself."""
        # The tanh form is what GPT-2 was trained with ("gelu_new").
        return self.c_proj(jax.nn.gelu(self.c_fc(x), approximate=True))


class Block(nnx.Module):
    """Attention and MLP, each behind a layer norm and around a residual."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Builds the parts of one block."""
        self.ln_1 = nnx.LayerNorm(config.width, epsilon=_EPSILON, rngs=rngs)
        self.attn = Attention(config, rngs=rngs)
        self.ln_2 = nnx.LayerNorm(config.width, epsilon=_EPSILON, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps (B, T, W) to (B, T, W)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2(nnx.Module):
    """The language model: token ids in, logits of the next token out."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        """Builds the model and draws its parameters."""
        self.wte = _embed(config.vocab_size, config.width, rngs)
        self.wpe = _embed(config.context, config.width, rngs)
        self.h = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])
        self.ln_f = nnx.LayerNorm(config.width, epsilon=_EPSILON, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps token ids (B, T) to logits (B, T, V)."""
        x = self.wte(tokens) + self.wpe(jnp.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        return self.wte.attend(self.ln_f(x))


def create(config: ModelConfig, seed: int) -> tuple[nnx.GraphDef, Params]:
    """Builds a model and takes it apart: its static part, and its parameters.

    The training step is then a plain function of a plain tree, which dispatches
    faster than a module and is what optax and Orbax know best.
    """
    graphdef, state = nnx.split(GPT2(config, rngs=nnx.Rngs(seed)), nnx.Param)
    return graphdef, nnx.to_pure_dict(state)


def next_token_loss(
    graphdef: nnx.GraphDef, params: Params, tokens: jax.Array
) -> jax.Array:
    """Mean cross-entropy in nats per token, of tokens (B, T + 1): a scalar."""
    logits = nnx.merge(graphdef, params)(tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean()


def parameter_count(config: ModelConfig) -> int:
    """Returns the number of parameters: (V + T + 2) W + layers (12 W^2 + 13 W)."""
    width = config.width
    embeddings = (config.vocab_size + config.context) * width
    return embeddings + config.layers * (12 * width**2 + 13 * width) + 2 * width


def hugging_face_name(path: str) -> str:
    """Returns the name of a parameter in a Hugging Face checkpoint.

    "h/0/attn/c_attn/kernel" is there "h.0.attn.c_attn.weight", of the same shape.
    """
    *modules, word = path.split("/")
    return ".".join([*modules, "weight" if word in _FLAX_WORDS else word])
