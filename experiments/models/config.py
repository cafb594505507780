"""Sizes of the models: the settings, what is refused, and the published sizes.

Nothing here imports jax: `--help` and a refused command line answer at once.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

from experiments.common.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Computed:
    """How a model is computed."""

    dropout: float = 0.0
    """Probability with which training zeroes an activation; 0 drops nothing."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; the parameters stay float32."""
    remat: bool = False
    """Recompute each block in the backward pass, which saves its activations."""
    scan: bool = False
    """Stack the parameters of the blocks and loop over them: compiles faster."""


class _HeadWidth:
    """Of heads that share the width of the model."""

    width: int
    heads: int

    @property
    def head_width(self) -> int:
        """Size of one head's queries, keys and values."""
        return self.width // self.heads


@dataclasses.dataclass(frozen=True)
class GPT2Config(_Computed, _HeadWidth):
    """The size of the GPT-2, and how it is computed."""

    layers: int = 4
    """Number of transformer blocks."""
    width: int = 256
    """Size of the residual stream; a multiple of the number of heads."""
    heads: int = 4
    """Attention heads in each block."""
    context: int = 128
    """Tokens that the model sees at once; also the length of a packed example."""
    vocab_size: int = 4096
    """Tokens in the vocabulary."""

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values: all."""
        return self.heads


@dataclasses.dataclass(frozen=True)
class T5Config(_Computed):
    """The size of the T5, and how it is computed."""

    layers: int = 2
    """Number of transformer blocks of the encoder."""
    decoder_layers: int = 2
    """Number of transformer blocks of the decoder."""
    width: int = 128
    """Size of the residual stream (`d_model`)."""
    head_width: int = 32
    """Size of one head's queries, keys and values (`d_kv`)."""
    hidden: int = 512
    """Size of the inner layer of the feed-forward parts (`d_ff`)."""
    heads: int = 4
    """Attention heads in each block."""
    vocab_size: int = 4096
    """Tokens in the vocabulary; token 0 pads and also starts the decoder."""
    gated: bool = False
    """Feed-forward parts with a gated GELU (v1.1) in place of a ReLU (v1.0)."""
    tied: bool = True
    """The embedding is also the head (v1.0); v1.1 has a head of its own."""
    buckets: int = 32
    """Buckets of relative positions, each with one bias per head; even, at least 4."""
    max_distance: int = 128
    """Distance from which on all relative positions share the last bucket."""


@dataclasses.dataclass(frozen=True)
class LlamaConfig(_Computed, _HeadWidth):
    """The size of the Llama, and how it is computed."""

    layers: int = 2
    """Number of transformer blocks."""
    width: int = 128
    """Size of the residual stream; a multiple of the number of heads."""
    hidden: int = 352
    """Size of the inner layer of the feed-forward parts."""
    heads: int = 4
    """Attention heads in each block."""
    kv_heads: int = 2
    """Heads of keys and values, each for as many of the others."""
    context: int = 128
    """Tokens that the model sees at once; also the length of a packed example."""
    vocab_size: int = 4096
    """Tokens in the vocabulary."""
    rope_base: float = 10_000.0
    """Base of the angles of rotary positions."""
    epsilon: float = 1e-5
    """Added to the mean square in a norm."""
    tied: bool = False
    """The embedding is also the head."""


DecoderConfig = GPT2Config | LlamaConfig
"""Of models that have no encoder."""
Config = DecoderConfig | T5Config


def validate(config: Config) -> None:
    """Refuses sizes that make no sense.

    Args:
        config: the settings of a model.

    Raises:
        ConfigError: naming the argument, its value, and what to give instead.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if type(field.default) is int and value < 1:
            _refuse(field.name, f"must be at least 1, got {value}")
    if not 0 <= config.dropout < 1:
        _refuse("dropout", f"must be in [0, 1), got {config.dropout}; 0.1 is usual")
    if config.dtype not in ("float32", "bfloat16"):
        _refuse("dtype", f"must be float32 or bfloat16, got {config.dtype!r}")
    if isinstance(config, DecoderConfig):
        if config.width % config.heads:
            _refuse(
                "heads",
                f"must divide `--model.width`, got {config.heads} and {config.width}; "
                f"{math.gcd(config.width, config.heads)} heads would",
            )
        if isinstance(config, LlamaConfig):
            _validate_llama(config)
        return
    buckets, exact = config.buckets, config.buckets // 2
    # The encoder halves them for the two directions, and half of those are exact.
    if buckets < 4 or buckets % 2:
        _refuse("buckets", f"must be even and at least 4, got {buckets}; T5 has 32")
    if config.max_distance <= exact:  # of the decoder, which has the larger number
        _refuse(
            "max_distance",
            f"must be above half of `--model.buckets` ({exact}), got "
            f"{config.max_distance}; T5 has 128 for 32 buckets",
        )


def _validate_llama(config: LlamaConfig) -> None:
    if config.heads % config.kv_heads:
        _refuse(
            "kv_heads",
            f"must divide `--model.heads`, got {config.kv_heads} and {config.heads}; "
            f"{math.gcd(config.heads, config.kv_heads)} would",
        )
    if config.head_width % 2:
        _refuse(
            "heads",
            f"must leave an even size to each, got {config.heads} of "
            f"{config.head_width}; rotary positions turn pairs",
        )
    for field in ("rope_base", "epsilon"):
        if getattr(config, field) <= 0:
            value = getattr(config, field)
            _refuse(field, f"must be positive, got {value}; Llama 2 has 1e4 and 1e-5")


def _refuse(field: str, message: str) -> None:
    raise ConfigError(f"`--model.{field.replace('_', '-')}` {message}")


def _gpt2(layers: int, width: int, heads: int) -> GPT2Config:
    return GPT2Config(layers, width, heads, 1024, 50257, dropout=0.1)


def _t5(layers: int, *sizes: int, v1_1: bool) -> T5Config:
    kind = {"vocab_size": 32128, "gated": v1_1, "tied": not v1_1, "dropout": 0.1}
    return T5Config(layers, layers, *sizes, **kind)


PUBLISHED: dict[str, Config] = {
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "llama-2-7b": LlamaConfig(32, 4096, 11008, 32, 32, 4096, 32000),
    "llama-3-8b": LlamaConfig(32, 4096, 14336, 32, 8, 8192, 128256, 500_000.0),
    "tinyllama-1.1b": LlamaConfig(22, 2048, 5632, 32, 4, 2048, 32000),
    "smollm2-135m": LlamaConfig(30, 576, 1536, 9, 3, 8192, 49152, 100_000.0, tied=True),
    "t5-small": _t5(6, 512, 64, 2048, 8, v1_1=False),
    "t5-base": _t5(12, 768, 64, 3072, 12, v1_1=False),
    "t5-large": _t5(24, 1024, 64, 4096, 16, v1_1=False),
    "t5-3b": _t5(24, 1024, 128, 16384, 32, v1_1=False),
    "t5-v1_1-small": _t5(8, 512, 64, 1024, 6, v1_1=True),
    "t5-v1_1-base": _t5(12, 768, 64, 2048, 12, v1_1=True),
}
"""The published models by their names, with the dropout they were trained with."""
PublishedName = Literal[tuple(PUBLISHED)]


def check_context(names: Iterable[str], flags: str, length: int) -> None:
    """Refuses examples longer than the context of a published model that has one."""
    for name in names:
        most = getattr(PUBLISHED[name], "context", length)
        if length > most:
            raise ConfigError(
                f"{flags} must be at most {most}, the context of {name}, got {length}"
            )
