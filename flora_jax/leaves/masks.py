"""Masks that most models need: embeddings, and everything else."""

from __future__ import annotations

import re

from flora_jax._typing import Shape

# Names of embeddings and output heads in Flax, GPT-2, T5, Llama, Gemma and MaxText.
_WORDS = (
    "embed",
    "embedder",
    "embedding",
    "embeddings",
    "embed_tokens",
    "input_embedding",
    "lm_head",
    "logits_dense",
    "position_embedder",
    "pos_embedding",
    "relative_attention_bias",
    "shared",
    "token_embedder",
    "wpe",
    "wte",
)
_EMBEDDING = re.compile(rf"(^|[/.])({'|'.join(_WORDS)})([/.]|$)")


def embeddings(path: str, shape: Shape) -> bool:
    """Whether a leaf belongs to an embedding or an output head, by its path.

    True if a part of the path, between slashes or dots, is ``embed``, ``embedder``,
    ``embedding``, ``embeddings``, ``embed_tokens``, ``input_embedding``, ``lm_head``,
    ``logits_dense``, ``position_embedder``, ``pos_embedding``,
    ``relative_attention_bias``, ``shared``, ``token_embedder``, ``wpe`` or ``wte``.

    Args:
      path: normalized path of the leaf, for example ``"h/0/attn/c_attn/kernel"``.
      shape: its shape, which is not looked at.
    """
    del shape
    return _EMBEDDING.search(path) is not None


def not_embeddings(path: str, shape: Shape) -> bool:
    """Whether a leaf is no embedding and no output head: the usual ``mask``.

    The gradient of an embedding is sparse by rows, unlike a matrix product's. See
    :func:`embeddings` for the names.

    Example:
      >>> import flora_jax as fj
      >>> fj.not_embeddings("wte/embedding", (50257, 768))
      False
      >>> sketch = fj.Sketch(256, mask=fj.not_embeddings)
    """
    return not embeddings(path, shape)
