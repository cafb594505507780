"""Shapes of a model's parameters from its files, without their values.

Headers of safetensors files and their index:
https://huggingface.co/docs/safetensors; the names of configurations:
https://huggingface.co/docs/transformers.
"""

from __future__ import annotations

import functools
import json
import pathlib
import re
import struct
from collections.abc import Callable
from typing import Any, TypeAlias, TypeGuard

import jax

from flora_jax._typing import Shape

Shapes: TypeAlias = dict[str, jax.ShapeDtypeStruct]
_Weights: TypeAlias = dict[str, Shape]
_Sizes: TypeAlias = Callable[..., int]

_LARGEST_HEADER = 100 * 10**6  # As the format's own readers allow.
_LARGEST_SIZE = 2**31 - 1  # No model has a longer axis.
_MOST_LAYERS = 10**4
_DAMAGED = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
# Masks and frequencies that older files store among the weights.
_BUFFER = re.compile(r"(^|\.)(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)$")


class ModelFileError(ValueError):
    """A file that shapes cannot be read from; one line that says why."""


def read_shapes(path: str | pathlib.Path, dtype: str | None = None) -> Shapes:
    """Shapes and dtypes of all parameters, by the names that the file has.

    Args:
      path: a safetensors file, an index ``*.safetensors.index.json`` with its files
        in the same folder, or a Hugging Face ``config.json`` of T5, GPT-2 or Llama.
      dtype: a dtype for all parameters; None keeps the file's, float32 if it has none.

    Returns:
      A dict of ShapeDtypeStructs.

    Raises:
      ModelFileError: naming the file and what is wrong with it.
    """
    path = pathlib.Path(path)
    if path.suffix == ".safetensors":
        shapes = _safetensors(path)
    else:
        content = _read_json(path)
        if "weight_map" in content:
            shapes = _index(path, content)
        elif "model_type" in content:
            shapes = _config(path, content)
        else:
            raise ModelFileError(
                f"{path}: neither an index of safetensors files (it has no"
                " 'weight_map') nor a model's configuration (no 'model_type')"
            )
    if not shapes:
        raise ModelFileError(f"{path}: it holds no parameters")
    if dtype is not None:
        shapes = {k: jax.ShapeDtypeStruct(x.shape, dtype) for k, x in shapes.items()}
    return shapes


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelFileError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelFileError(
            f"{path}: not JSON ({error}); give a .safetensors file, its index, or a"
            " config.json"
        ) from error
    if not isinstance(content, dict):
        raise ModelFileError(f"{path}: its JSON is not an object")
    return content


def _safetensors(path: pathlib.Path) -> Shapes:
    """Reads 8 bytes, the header's length, and the header."""
    try:
        with path.open("rb") as file:
            first = file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
            header = file.read(length) if length <= _LARGEST_HEADER else b""
    except OSError as error:
        raise ModelFileError(f"{path}: {error.strerror}") from error
    if not length or len(header) != length:
        raise ModelFileError(
            f"{path}: no safetensors header of {length} bytes; is the file complete?"
        )
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        found = {
            name: (_shape(entry["shape"]), str(entry["dtype"]))
            for name, entry in entries.items()
            if not _BUFFER.search(name)
        }
    except _DAMAGED as error:
        raise ModelFileError(f"{path}: its safetensors header is damaged") from error
    for name, (_, dtype) in found.items():
        if dtype not in _DTYPES:
            raise ModelFileError(
                f"{path}: {name} is of dtype {dtype}, which is not trained; give the"
                f" model before quantization ({', '.join(_DTYPES)})"
            )
    return {k: jax.ShapeDtypeStruct(x, _DTYPES[kind]) for k, (x, kind) in found.items()}


def _shape(sizes: Any) -> Shape:
    """A shape from a header, or ValueError if malformed."""
    if not isinstance(sizes, list) or not all(map(_is_size, sizes)):
        raise ValueError(sizes)
    return tuple(sizes)


def _is_size(value: Any, most: int = _LARGEST_SIZE) -> TypeGuard[int]:
    """Whether it is a positive int that an axis can have."""
    return type(value) is int and 0 < value <= most


def _index(path: pathlib.Path, content: dict[str, Any]) -> Shapes:
    files = content["weight_map"]
    if not isinstance(files, dict) or set(map(type, files.values())) - {str}:
        raise ModelFileError(f"{path}: 'weight_map' is not an object of file names")
    shapes: Shapes = {}
    for name in sorted(set(files.values())):
        if pathlib.PurePath(name).name != name or "\0" in name:
            raise ModelFileError(
                f"{path}: {name!r} is not the name of a file in its folder"
            )
        shapes |= _safetensors(path.parent / name)
    missing = sorted(k for k in files if k not in shapes and not _BUFFER.search(k))
    if missing:
        raise ModelFileError(f"{path}: its files do not hold {missing[0]}")
    return shapes


def _config(path: pathlib.Path, content: dict[str, Any]) -> Shapes:
    kind = str(content["model_type"])
    if kind not in _FAMILIES:
        raise ModelFileError(
            f"{path}: model_type {kind!r} is not known, only"
            f" {', '.join(_FAMILIES)}; give the model's safetensors file"
        )
    dtype = str(content.get("dtype") or content.get("torch_dtype") or "float32")
    if dtype not in _DTYPES.values():
        raise ModelFileError(
            f"{path}: dtype {dtype!r} is not known, only {', '.join(_DTYPES.values())}"
        )
    family, tied = _FAMILIES[kind]
    shapes = family(functools.partial(_size, path, content), content)
    if not content.get("tie_word_embeddings", tied):
        shapes["lm_head.weight"] = next(iter(shapes.values()))  # As the embedding.
    return {name: jax.ShapeDtypeStruct(x, dtype) for name, x in shapes.items()}


def _size(
    path: pathlib.Path, content: dict[str, Any], name: str, default: int | None = None
) -> int:
    """A positive int of a configuration."""
    value = content.get(name)
    value = default if value is None else value
    if not _is_size(value, _MOST_LAYERS if "layer" in name else _LARGEST_SIZE):
        raise ModelFileError(
            f"{path}: '{name}' must be a positive integer of a sensible size,"
            f" got {value!r}"
        )
    return value


def _gpt2(size: _Sizes, _: dict[str, Any]) -> _Weights:
    d = size("n_embd")
    hidden = size("n_inner", 4 * d)
    norms = {"ln_1": (d,), "ln_2": (d,)}
    attention = {"attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d)}
    mlp = {"mlp.c_fc": (d, hidden), "mlp.c_proj": (hidden, d)}
    block: _Weights = {}
    for name, shape in (norms | attention | mlp).items():
        block |= {f"{name}.weight": shape, f"{name}.bias": shape[-1:]}
    shapes: _Weights = {
        "wte.weight": (size("vocab_size"), d),
        "wpe.weight": (size("n_positions"), d),
        "ln_f.weight": (d,),
        "ln_f.bias": (d,),
    }
    return shapes | _repeated("h.{}", size("n_layer"), block)


def _t5(size: _Sizes, content: dict[str, Any]) -> _Weights:
    d, heads = size("d_model"), size("num_heads")
    inner, hidden = heads * size("d_kv"), size("d_ff")
    layers = size("num_layers")
    depths = {"encoder": layers, "decoder": size("num_decoder_layers", layers)}
    gated = str(content.get("feed_forward_proj")).startswith("gated")
    buckets = size("relative_attention_num_buckets", 32)
    attention = {"q": (inner, d), "k": (inner, d), "v": (inner, d), "o": (d, inner)}
    up = ("wi_0", "wi_1") if gated else ("wi",)
    feed_forward = dict.fromkeys(up, (hidden, d)) | {"wo": (d, hidden)}
    shapes = {"shared.weight": (size("vocab_size"), d)}
    for stack, depth in depths.items():
        parts = {"SelfAttention": attention, "DenseReluDense": feed_forward}
        if stack == "decoder":
            parts = {"SelfAttention": attention, "EncDecAttention": attention} | parts
        block: _Weights = {}
        for i, (part, products) in enumerate(parts.items()):
            block |= {f"{i}.{part}.{x}.weight": shape for x, shape in products.items()}
            block[f"{i}.layer_norm.weight"] = (d,)
        shapes |= _repeated(f"{stack}.block.{{}}.layer", depth, block)
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        shapes |= {bias: (buckets, heads), f"{stack}.final_layer_norm.weight": (d,)}
    return shapes


def _llama(size: _Sizes, content: dict[str, Any]) -> _Weights:
    d, heads = size("hidden_size"), size("num_attention_heads")
    head = size("head_dim", d // heads)
    keys = head * size("num_key_value_heads", heads)
    hidden = size("intermediate_size")
    queries = head * heads
    attention = {"q": (queries, d), "k": (keys, d), "v": (keys, d), "o": (d, queries)}
    mlp = {"gate": (hidden, d), "up": (hidden, d), "down": (d, hidden)}
    norms = ("input_layernorm", "post_attention_layernorm")
    block: _Weights = {f"{norm}.weight": (d,) for norm in norms}
    for part, products in {"self_attn": attention, "mlp": mlp}.items():
        biased = content.get("mlp_bias" if part == "mlp" else "attention_bias")
        for x, shape in products.items():
            block[f"{part}.{x}_proj.weight"] = shape
            if biased:
                block[f"{part}.{x}_proj.bias"] = shape[:1]
    shapes = {"model.embed_tokens.weight": (size("vocab_size"), d)}
    shapes |= _repeated("model.layers.{}", size("num_hidden_layers"), block)
    return shapes | {"model.norm.weight": (d,)}


def _repeated(place: str, layers: int, block: _Weights) -> _Weights:
    """The shapes of a block in each layer."""
    return {
        f"{place.format(i)}.{name}": shape
        for i in range(layers)
        for name, shape in block.items()
    }


# A function from a configuration to parameter shapes, with the embedding as its first
# entry; and whether the output head is tied to the embedding by default.
_FAMILIES: dict[str, tuple[Callable[..., _Weights], bool]] = {
    "gpt2": (_gpt2, True),
    "llama": (_llama, False),
    "mistral": (_llama, False),
    "mt5": (_t5, True),
    "t5": (_t5, True),
}
