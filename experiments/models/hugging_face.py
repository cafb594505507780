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
from safetensors.numpy import save_file

from experiments.common.errors import ConfigError
from experiments.models import blocks, hugging_face_config
from experiments.models.build import Params, create
from experiments.models.config import Config, GPT2Config, validate

Tensors = dict[str, np.ndarray]

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PREFIX = "transformer."  # of GPT-2 with its head; the bare model has none

# Causal masks of old GPT-2 files, and a table that T5 never read.
_IGNORED = re.compile(
    r"h\.\d+\.attn\.(bias|masked_bias)"
    r"|decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
)
# Names under which some files hold the embedding once more.
_COPIES = {
    "wte.weight": ("lm_head.weight",),
    "shared.weight": (
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        "lm_head.weight",
    ),
}
# T5's biases of positions belong to the stack here, and to its first block there.
_POSITIONS = "block.0.layer.0.SelfAttention.relative_attention_bias"


def read_config(path: str | pathlib.Path) -> Config:
    """Returns the settings that the checkpoint in folder `path` describes.

    Raises:
        ConfigError: there is no `config.json`, or the models here cannot do what it
            says.
    """
    data = json.loads(_existing(path, "config.json").read_text(encoding="utf-8"))
    config = hugging_face_config.from_json(data)
    validate(config)
    return config


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
    text = json.dumps(hugging_face_config.to_json(config), indent=2)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
    prefix = _PREFIX if isinstance(config, GPT2Config) else ""
    tensors = {
        prefix + name: tensor for name, tensor in to_tensors(params, config).items()
    }
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})


def from_tensors(tensors: Tensors, config: Config) -> Params:
    """Turns tensors by their Hugging Face names into parameters; see `load`."""
    tensors = {name.removeprefix(_PREFIX): x for name, x in tensors.items()}
    unrolled = dataclasses.replace(config, scan=False)
    expected = _by_path(jax.eval_shape(lambda: create(unrolled, 0)[1]))
    names = {path: _name(path, config) for path in expected}
    _check_names(tensors, {name for name, _ in names.values()})
    params: Params = {}
    for path, leaf in expected.items():
        name, transposed = names[path]
        tensor = tensors[name].T if transposed else tensors[name]
        shape = leaf.shape[::-1] if transposed else leaf.shape
        _check_shape(name, tensors[name], shape)
        *parents, last = path
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = np.asarray(tensor, np.float32)
    if config.scan:
        params = blocks.stack(params, np)
    return jax.tree.map(jnp.asarray, params)


def to_tensors(params: Params, config: Config) -> Tensors:
    """Undoes `from_tensors`, with names without a prefix."""
    unrolled = blocks.unstack(params) if config.scan else params
    tensors = {}
    for path, leaf in _by_path(unrolled).items():
        name, transposed = _name(path, config)
        array = np.asarray(leaf)
        # The file format knows no strides.
        tensors[name] = np.ascontiguousarray(array.T if transposed else array)
    return tensors


def _by_path(params: Params) -> dict[tuple[Any, ...], Any]:
    return {
        tuple(entry.key for entry in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def _name(path: tuple[Any, ...], config: Config) -> tuple[str, bool]:
    """Returns the name of a parameter in a checkpoint, and whether it is transposed.

    Modules have the same names; the last word is "bias" or "weight" there. Kernels are
    (in, out) here and in GPT-2's files, (out, in) in T5's.
    """
    *modules, last = map(str, path)
    name = ".".join([*modules, "bias" if last == "bias" else "weight"])
    name = name.replace(".relative_attention_bias", f".{_POSITIONS}")
    return name, last == "kernel" and not isinstance(config, GPT2Config)


def _check_names(tensors: Tensors, expected: set[str]) -> None:
    copies = {
        copy: name
        for name in _COPIES.keys() & expected
        for copy in _COPIES[name]
        if copy not in expected
    }
    missing = sorted(expected - tensors.keys())
    if missing:
        raise ConfigError(
            f"the checkpoint has no {_some(missing)}; `config` must be the one of its "
            "config.json"
        )
    known = expected | copies.keys()
    unknown = sorted(
        name for name in tensors.keys() - known if not _IGNORED.fullmatch(name)
    )
    if unknown:
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


def _check_shape(name: str, tensor: np.ndarray, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise ConfigError(
            f"the checkpoint's {name} has shape {tensor.shape}, but `config` says "
            f"{expected}; use the one of its config.json"
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
