"""Hugging Face checkpoints, read from and written to local files.

A checkpoint is a folder with `config.json` and `model.safetensors`, or with several
files and their index.
"""

import dataclasses
import json
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from experiments.common.errors import ConfigError
from experiments.models import blocks
from experiments.models.build import Params, create
from experiments.models.config import (
    Config,
    GPT2Config,
    LlamaConfig,
    T5Config,
    validate,
)

Tensors = dict[str, np.ndarray]

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Of models with their heads; the bare ones have none, nor has a head of its own.
_PREFIXES = {GPT2Config: "transformer.", LlamaConfig: "model."}

# Causal masks of old GPT-2 files, frequencies of old Llama files, and a table that T5
# never read.
_IGNORED = re.compile(
    r"h\.\d+\.attn\.(bias|masked_bias)"
    r"|layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    r"|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
)
# Names under which some files hold the embedding once more.
_COPIES = {
    "wte.weight": ("lm_head.weight",),
    "embed_tokens.weight": ("lm_head.weight",),
    "shared.weight": (
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        "lm_head.weight",
    ),
}
# T5's biases of positions belong to the stack here, and to its first block there.
_POSITIONS = "block.0.layer.0.SelfAttention.relative_attention_bias"

_KINDS = {"gpt2": GPT2Config, "llama": LlamaConfig, "t5": T5Config}
# Our settings by their names in `config.json`.
_FIELDS = {
    "gpt2": {
        "n_layer": "layers",
        "n_embd": "width",
        "n_head": "heads",
        "n_positions": "context",
        "vocab_size": "vocab_size",
        "resid_pdrop": "dropout",
    },
    "llama": {
        "num_hidden_layers": "layers",
        "hidden_size": "width",
        "intermediate_size": "hidden",
        "num_attention_heads": "heads",
        "num_key_value_heads": "kv_heads",
        "max_position_embeddings": "context",
        "vocab_size": "vocab_size",
        "rope_theta": "rope_base",
        "rms_norm_eps": "epsilon",
        "tie_word_embeddings": "tied",
    },
    "t5": {
        "num_layers": "layers",
        "num_decoder_layers": "decoder_layers",
        "d_model": "width",
        "d_kv": "head_width",
        "d_ff": "hidden",
        "num_heads": "heads",
        "vocab_size": "vocab_size",
        "relative_attention_num_buckets": "buckets",
        "relative_attention_max_distance": "max_distance",
        "dropout_rate": "dropout",
    },
}
# Files leave out what their library had as a default when they were written.
_DEFAULTS = {
    "resid_pdrop": 0.1,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "rope_theta": 10_000.0,
}
# What our models cannot do otherwise, and what a file means that does not say.
_FIXED = {
    "gpt2": {
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    "llama": {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "rope_scaling": None,
    },
    "t5": {"layer_norm_epsilon": 1e-6, "pad_token_id": 0},
}
_FEED_FORWARD = {"relu": False, "gated-gelu": True}


def read_config(path: str | pathlib.Path) -> Config:
    """Returns the settings that the checkpoint in folder `path` describes.

    Raises:
        ConfigError: there is no `config.json`, or the models here cannot do what it
            says.
    """
    data = json.loads(_existing(path, "config.json").read_text(encoding="utf-8"))
    kind = data.get("model_type")
    if kind not in _KINDS:
        raise ConfigError(
            f"`model_type` in config.json must be gpt2, llama or t5, got {kind!r}; "
            "other models cannot be read"
        )
    if kind == "llama":
        data = _llama(data)
    for name, value in _FIXED[kind].items():
        if data.get(name, value) != value:
            raise ConfigError(
                f"`{name}` in config.json must be {value!r}, got {data[name]!r}; "
                "the model here has no other form"
            )
    data = _DEFAULTS | data
    if data.get("num_decoder_layers") is None:
        data["num_decoder_layers"] = data.get("num_layers")
    options = _gated_and_tied(data) if kind == "t5" else {}
    for theirs, ours in _FIELDS[kind].items():
        if data.get(theirs) is None:
            raise ConfigError(f"`{theirs}` is missing in config.json; add its value")
        options[ours] = data[theirs]
    config = _KINDS[kind](**options)
    inner = data.get("n_inner")
    if kind == "gpt2" and inner not in (None, 4 * config.width):
        raise ConfigError(
            f"`n_inner` in config.json must be null or 4 n_embd ({4 * config.width}), "
            f"got {inner}; other widths cannot be read"
        )
    validate(config)
    return config


def _llama(data: dict[str, Any]) -> dict[str, Any]:
    """Settings of newer files by the names of older ones, and what these left out."""
    positions = data.get("rope_parameters") or data.get("rope_scaling") or {}
    kind = positions.get("rope_type", positions.get("type", "default"))
    if kind != "default":
        raise ConfigError(
            f"`rope_type` in config.json must be default, got {kind!r}; other rotary "
            "positions cannot be read"
        )
    heads, width = data.get("num_attention_heads"), data.get("hidden_size")
    found = {"num_key_value_heads": heads, "tie_word_embeddings": False}
    data = found | {name: x for name, x in data.items() if x is not None}
    data |= {"rope_scaling": None}
    if "rope_theta" in positions:
        data["rope_theta"] = positions["rope_theta"]
    if heads and width and data.get("head_dim", width // heads) * heads != width:
        raise ConfigError(
            f"`head_dim` in config.json must be hidden_size / num_attention_heads "
            f"({width // heads}), got {data['head_dim']}; other sizes cannot be read"
        )
    return data


def _gated_and_tied(data: dict[str, Any]) -> dict[str, Any]:
    word = data.get("feed_forward_proj", "relu")
    if word not in _FEED_FORWARD:
        raise ConfigError(
            f"`feed_forward_proj` in config.json must be one of "
            f"{', '.join(_FEED_FORWARD)}, got {word!r}; other forms cannot be read"
        )
    # Newer files say whether the decoder's output is scaled in an entry of its own,
    # and call the embeddings tied whatever they are.
    tied = data.get("tie_word_embeddings", True)
    tied = tied and data.get("scale_decoder_outputs", True)
    return {"gated": _FEED_FORWARD[word], "tied": tied}


def _json_of(config: Config) -> dict[str, Any]:
    if isinstance(config, GPT2Config):
        kind = "gpt2"
        own = dict.fromkeys(("embd_pdrop", "attn_pdrop"), config.dropout)
        own["architectures"] = ["GPT2LMHeadModel"]
    elif isinstance(config, LlamaConfig):
        kind, own = "llama", {"architectures": ["LlamaForCausalLM"]}
    else:
        kind = "t5"
        words = {gated: word for word, gated in _FEED_FORWARD.items()}
        own = {
            "architectures": ["T5ForConditionalGeneration"],
            "feed_forward_proj": words[config.gated],
            "tie_word_embeddings": config.tied,
            "decoder_start_token_id": 0,
            "eos_token_id": 1,
            "is_encoder_decoder": True,
        }
    sizes = {theirs: getattr(config, ours) for theirs, ours in _FIELDS[kind].items()}
    return {"model_type": kind, **sizes, **own, **_FIXED[kind]}


def load(path: str | pathlib.Path, config: Config) -> Params:
    """Reads the parameters of a checkpoint.

    Args:
        path: its folder.
        config: the settings, from `read_config`; `scan`, for one, is free.

    Returns:
        The tree that `create(config, seed)` returns, float32 whatever the file has.

    Raises:
        ConfigError: a file or a parameter is missing, a parameter is unknown, or has
            another shape than `config` says.
    """
    return from_tensors(_read_tensors(pathlib.Path(path)), config)


def save(params: Params, config: Config, path: str | pathlib.Path) -> None:
    """Writes a checkpoint that transformers' `from_pretrained` reads.

    Args:
        params: the parameters, as `create` makes them.
        config: their settings.
        path: a folder, which is made if need be.
    """
    folder = pathlib.Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_json_of(config), indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    prefix = _PREFIXES.get(type(config), "")
    tensors = {
        name if name.startswith("lm_head.") else prefix + name: x
        for name, x in to_tensors(params, config).items()
    }
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})


def from_tensors(tensors: Tensors, config: Config) -> Params:
    """Turns tensors by their Hugging Face names into parameters; see `load`."""
    prefix = _PREFIXES.get(type(config), "")
    tensors = {name.removeprefix(prefix): x for name, x in tensors.items()}
    unrolled = dataclasses.replace(config, scan=False)
    expected = flatten_dict(jax.eval_shape(lambda: create(unrolled, 0)[1]))
    names = {path: _name(path, config) for path in expected}
    _check_names(tensors, {name for name, _ in names.values()})
    flat = {}
    for path, leaf in expected.items():
        name, transposed = names[path]
        tensor = tensors[name]
        shape = leaf.shape[::-1] if transposed else leaf.shape
        if tensor.shape != shape:
            raise ConfigError(
                f"the checkpoint's {name} has shape {tensor.shape}, but `config` says "
                f"{shape}; use the one of its config.json"
            )
        flat[path] = np.asarray(tensor.T if transposed else tensor, np.float32)
    params = unflatten_dict(flat)
    if config.scan:
        params = blocks.stack(params)
    return jax.tree.map(jnp.asarray, params)


def to_tensors(params: Params, config: Config) -> Tensors:
    """Undoes `from_tensors`, with names without a prefix."""
    unrolled = blocks.unstack(params) if config.scan else params
    tensors = {}
    for path, leaf in flatten_dict(unrolled).items():
        name, transposed = _name(path, config)
        array = np.asarray(leaf)
        # The file format knows no strides.
        tensors[name] = np.ascontiguousarray(array.T if transposed else array)
    return tensors


def _name(path: tuple[Any, ...], config: Config) -> tuple[str, bool]:
    """Returns the name of a parameter in a checkpoint, and whether it is transposed.

    Modules have the same names; the last word is "bias" or "weight" there. Kernels are
    (in, out) here and in GPT-2's files, (out, in) in Llama's and T5's.
    """
    *modules, last = map(str, path)
    name = ".".join([*modules, "bias" if last == "bias" else "weight"])
    name = name.replace(".relative_attention_bias", f".{_POSITIONS}")
    return name, last == "kernel" and not isinstance(config, GPT2Config)


def _check_names(tensors: Tensors, expected: set[str]) -> None:
    tied = _COPIES.keys() & expected
    copies = {copy: name for name in tied for copy in _COPIES[name]}
    copies = {copy: copies[copy] for copy in copies.keys() - expected}
    if missing := sorted(expected - tensors.keys()):
        raise ConfigError(
            f"the checkpoint has no {_some(missing)}; `config` must be the one of its "
            "config.json"
        )
    others = tensors.keys() - expected - copies.keys()
    if unknown := sorted(name for name in others if not _IGNORED.fullmatch(name)):
        raise ConfigError(
            f"the checkpoint has {_some(unknown)}, which this model does not; `config` "
            "must be the one of its config.json"
        )
    for copy in copies.keys() & tensors.keys():
        name = copies[copy]
        if not np.array_equal(tensors[copy], tensors[name]):
            raise ConfigError(
                f"the checkpoint's {copy} differs from {name}, to which the model ties "
                "it; an untied model needs `tie_word_embeddings` false in config.json"
            )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _read_tensors(folder: pathlib.Path) -> Tensors:
    tensors = {}
    for file in _weight_files(folder):
        with safetensors.safe_open(file, "numpy") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    index = folder / _INDEX
    if not index.exists():
        return [_existing(folder, _WEIGHTS)]
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    names = sorted(set(weight_map.values()))
    for name in names:
        # Names from a download: with both kinds of separators, drives, and "..".
        if pathlib.PureWindowsPath(name).name != name or name in ("", ".."):
            raise ConfigError(
                f"{index} must name files of its own folder, got {name!r}; download "
                "the checkpoint again, from a source that you trust"
            )
    return [_existing(folder, name) for name in names]


def _existing(folder: str | pathlib.Path, name: str) -> pathlib.Path:
    file = pathlib.Path(folder) / name
    if not file.is_file():
        raise ConfigError(
            f"`path` must be a folder with {name}, got {folder}, which has none; "
            "download the checkpoint with its safetensors files into it"
        )
    return file
