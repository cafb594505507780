"""Tiny models of every kind, with parameters that are all random."""

import dataclasses

import jax
import numpy as np

from experiments.models.config import DecoderConfig, GPT2Config, LlamaConfig, T5Config

GPT2 = GPT2Config(layers=2, width=16, heads=2, context=24, vocab_size=48)
# Heads times head width is not the width, the stacks differ in length (the decoder is
# the shorter one, since transformers cannot generate with a longer one), and there are
# distances in every bucket.
T5 = T5Config(
    layers=3,
    decoder_layers=2,
    width=16,
    head_width=4,
    hidden=24,
    heads=3,
    vocab_size=48,
    buckets=8,
    max_distance=10,
)
T5_GATED = dataclasses.replace(T5, gated=True, tied=False, decoder_layers=1)

LLAMA = LlamaConfig(
    layers=2, width=24, hidden=40, heads=6, kv_heads=2, context=24, vocab_size=48
)
LLAMA_TIED = dataclasses.replace(LLAMA, tied=True, kv_heads=6, rope_base=500.0)

CONFIGS = {"gpt2": GPT2, "llama": LLAMA, "t5": T5, "t5_gated": T5_GATED}


def randomized(params, seed=0, scale=0.2):
    """Adds noise everywhere: norms and biases at constants would hide mistakes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: np.float32(x + scale * rng.normal(size=x.shape)), params
    )


def batch_of(config, rows=3, seed=1):
    """A training batch, padded for T5."""
    rng = np.random.default_rng(seed)
    if isinstance(config, DecoderConfig):
        return {"tokens": rng.integers(0, config.vocab_size, (rows, 13))}
    return {
        "source": padded(rng, rows, 14, config.vocab_size),
        "target": padded(rng, rows, 12, config.vocab_size),
    }


def prompts_of(config, rows=3, seed=2):
    """A batch to decode from, padded: decoders on the left, T5 on the right."""
    rng = np.random.default_rng(seed)
    if not isinstance(config, DecoderConfig):
        return {"source": padded(rng, rows, 14, config.vocab_size)}
    right = padded(rng, rows, 7, config.vocab_size)
    return {"prompt": right[:, ::-1], "prompt_mask": right[:, ::-1] != 0}


def padded(rng, rows, length, vocab_size):
    """Tokens 1, 2, ... of random lengths, the first row full; 0 fills up."""
    lengths = rng.integers(2, length, rows)
    lengths[0] = length
    tokens = rng.integers(1, vocab_size, (rows, length))
    return np.where(np.arange(length) < lengths[:, None], tokens, 0).astype(np.int32)


def by_path(params):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
