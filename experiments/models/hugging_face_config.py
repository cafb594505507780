"""Hugging Face's `config.json`, from and to our settings."""

from typing import Any

from experiments.common.errors import ConfigError
from experiments.models.config import Config, GPT2Config, T5Config

_GPT2_FIELDS = {
    "layers": "n_layer",
    "width": "n_embd",
    "heads": "n_head",
    "context": "n_positions",
    "vocab_size": "vocab_size",
    "dropout": "resid_pdrop",
}
_T5_FIELDS = {
    "layers": "num_layers",
    "decoder_layers": "num_decoder_layers",
    "width": "d_model",
    "head_width": "d_kv",
    "hidden": "d_ff",
    "heads": "num_heads",
    "vocab_size": "vocab_size",
    "buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
    "dropout": "dropout_rate",
}
# Files leave out what their library had as a default when they were written.
_T5_DEFAULTS = {
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
}
_GPT2_DEFAULTS = {"resid_pdrop": 0.1}

# What our models cannot do otherwise, and what a file means that does not say.
_GPT2_FIXED = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
_T5_FIXED = {"layer_norm_epsilon": 1e-6, "pad_token_id": 0}
_FEED_FORWARD = {"relu": False, "gated-gelu": True}


def from_json(data: dict[str, Any]) -> Config:
    """Returns the settings that a `config.json` describes.

    Args:
        data: the content of the file.

    Raises:
        ConfigError: naming the entry that is missing or that our models cannot do.
    """
    kind = data.get("model_type")
    if kind == "gpt2":
        return _gpt2(data)
    if kind == "t5":
        return _t5(data)
    raise ConfigError(
        f"`model_type` in config.json must be gpt2 or t5, got {kind!r}; "
        "other models cannot be read"
    )


def to_json(config: Config) -> dict[str, Any]:
    """Returns the `config.json` that describes these settings."""
    if isinstance(config, GPT2Config):
        entries = {
            theirs: getattr(config, ours) for ours, theirs in _GPT2_FIELDS.items()
        }
        rates = dict.fromkeys(("embd_pdrop", "attn_pdrop"), config.dropout)
        kind = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
        return kind | entries | rates | _GPT2_FIXED
    entries = {theirs: getattr(config, ours) for ours, theirs in _T5_FIELDS.items()}
    words = {gated: word for word, gated in _FEED_FORWARD.items()}
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        **entries,
        **_T5_FIXED,
        "feed_forward_proj": words[config.gated],
        "tie_word_embeddings": config.tied,
        "decoder_start_token_id": 0,
        "eos_token_id": 1,
        "is_encoder_decoder": True,
    }


def _gpt2(data: dict[str, Any]) -> GPT2Config:
    _check_fixed(data, _GPT2_FIXED)
    config = GPT2Config(**_read(_GPT2_DEFAULTS | data, _GPT2_FIELDS))
    inner = data.get("n_inner")
    if inner not in (None, 4 * config.width):
        raise ConfigError(
            f"`n_inner` in config.json must be null or 4 n_embd ({4 * config.width}), "
            f"got {inner}; other widths cannot be read"
        )
    return config


def _t5(data: dict[str, Any]) -> T5Config:
    _check_fixed(data, _T5_FIXED)
    word = data.get("feed_forward_proj", "relu")
    if word not in _FEED_FORWARD:
        raise ConfigError(
            f"`feed_forward_proj` in config.json must be one of "
            f"{', '.join(_FEED_FORWARD)}, got {word!r}; other forms cannot be read"
        )
    if data.get("num_decoder_layers") is None:
        data = data | {"num_decoder_layers": data.get("num_layers")}
    # Newer files say whether the decoder's output is scaled in an entry of its own,
    # and call the embeddings tied whatever they are.
    tied = data.get("tie_word_embeddings", True)
    tied = tied and data.get("scale_decoder_outputs", True)
    return T5Config(
        **_read(_T5_DEFAULTS | data, _T5_FIELDS), gated=_FEED_FORWARD[word], tied=tied
    )


def _read(data: dict[str, Any], fields: dict[str, str]) -> dict[str, Any]:
    for name in fields.values():
        if data.get(name) is None:
            raise ConfigError(f"`{name}` is missing in config.json; add its value")
    return {ours: data[theirs] for ours, theirs in fields.items()}


def _check_fixed(data: dict[str, Any], fixed: dict[str, Any]) -> None:
    for name, value in fixed.items():
        if data.get(name, value) != value:
            raise ConfigError(
                f"`{name}` in config.json must be {value!r}, got {data[name]!r}; "
                "the model here has no other form"
            )
