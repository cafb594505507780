"""Checkpoints: names, what is refused, and back again."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from experiments.common.errors import ConfigError
from experiments.models import build, hugging_face
from experiments.models.config import PUBLISHED, LlamaConfig
from tests.experiments.models.tiny import CONFIGS, GPT2, LLAMA, T5, randomized

every_model = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)

# As `GPT2Model` of the transformers library lists them, for one block.
GPT2_SMALL = {
    "wte.weight": (50257, 768),
    "wpe.weight": (1024, 768),
    "h.0.ln_1.weight": (768,),
    "h.0.ln_1.bias": (768,),
    "h.0.attn.c_attn.weight": (768, 2304),
    "h.0.attn.c_attn.bias": (2304,),
    "h.0.attn.c_proj.weight": (768, 768),
    "h.0.attn.c_proj.bias": (768,),
    "h.0.ln_2.weight": (768,),
    "h.0.ln_2.bias": (768,),
    "h.0.mlp.c_fc.weight": (768, 3072),
    "h.0.mlp.c_fc.bias": (3072,),
    "h.0.mlp.c_proj.weight": (3072, 768),
    "h.0.mlp.c_proj.bias": (768,),
    "ln_f.weight": (768,),
    "ln_f.bias": (768,),
}


def test_gpt2_names_and_shapes():
    config = PUBLISHED["gpt2"]
    params = jax.eval_shape(lambda: build.create(config, 0)[1])
    found = {
        hugging_face._name(path, config)[0]: leaf.shape
        for path, leaf in flatten_dict(params).items()
    }
    first = {
        name: shape
        for name, shape in found.items()
        if not name.startswith("h.") or name.startswith("h.0.")
    }
    assert first == GPT2_SMALL
    assert len(found) == 4 + 12 * 12


def tensors_of(config, seed=0):
    params = randomized(build.create(config, 0)[1], seed)
    return params, hugging_face.to_tensors(params, config)


@pytest.mark.sample(1)
@every_model
@pytest.mark.parametrize("scan", [False, True])
def test_saved_and_loaded(config, scan, tmp_path):
    # A Llama's files have no place for it.
    dropout = 0.0 if isinstance(config, LlamaConfig) else 0.25
    config = dataclasses.replace(config, scan=scan, dropout=dropout)
    params = randomized(build.create(config, 0)[1])
    hugging_face.save(params, config, tmp_path / "new")
    read = hugging_face.read_config(tmp_path / "new")
    assert read == dataclasses.replace(config, scan=False)
    loaded = hugging_face.load(tmp_path / "new", config)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype("float32")}


LLAMA_JSON = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 6,
    "max_position_embeddings": 24,
    "vocab_size": 48,
    "rms_norm_eps": 1e-5,
}


def test_old_files_of_gpt2():
    params, tensors = tensors_of(GPT2)
    old = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    old["transformer.h.0.attn.bias"] = np.ones((1, 1, 24, 24))
    old["transformer.h.0.attn.masked_bias"] = np.float32(-1e4)
    old["lm_head.weight"] = tensors["wte.weight"]
    loaded = hugging_face.from_tensors(old, GPT2)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_old_files_of_llama():
    params, tensors = tensors_of(LLAMA)
    old = {
        name if name.startswith("lm_head") else f"model.{name}": tensor
        for name, tensor in tensors.items()
    }
    old["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    loaded = hugging_face.from_tensors(old, LLAMA)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({}, 10_000.0),
        ({"rope_theta": 7.0}, 7.0),
        ({"rope_theta": 7.0, "rope_parameters": {"rope_theta": 5.0}}, 5.0),
        ({"rope_scaling": {"rope_type": "default"}}, 10_000.0),
    ],
)
def test_rotary_positions_of_llama(entries, expected, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_JSON | entries))
    assert hugging_face.read_config(tmp_path).rope_base == expected


def test_other_rotary_positions_are_refused(tmp_path):
    scaled = LLAMA_JSON | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    (tmp_path / "config.json").write_text(json.dumps(scaled))
    with pytest.raises(
        ConfigError, match="`rope_type` .* must be default, got 'llama3"
    ):
        hugging_face.read_config(tmp_path)


def test_old_files_of_t5():
    params, tensors = tensors_of(T5)
    for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
        tensors[f"{name}.weight"] = tensors["shared.weight"]
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    tensors[name] = np.ones((8, 3))
    loaded = hugging_face.from_tensors(tensors, T5)
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@every_model
def test_refused_checkpoints(config):
    _, tensors = tensors_of(config)
    name = sorted(tensors)[0]
    fewer = {key: tensor for key, tensor in tensors.items() if key != name}
    with pytest.raises(ConfigError, match=f"checkpoint has no {name}"):
        hugging_face.from_tensors(fewer, config)
    more = dict.fromkeys("abcd", np.ones(1))
    with pytest.raises(ConfigError, match="checkpoint has a, b, c and 1 more, which"):
        hugging_face.from_tensors(tensors | more, config)
    with pytest.raises(ConfigError, match=rf"{name} has shape \(3, 2\), but"):
        hugging_face.from_tensors(tensors | {name: np.ones((3, 2))}, config)


def test_an_untied_head_is_not_dropped():
    _, tensors = tensors_of(T5)
    tensors["lm_head.weight"] = tensors["shared.weight"] + 1
    with pytest.raises(ConfigError, match="lm_head.weight differs from shared.weight"):
        hugging_face.from_tensors(tensors, T5)


def test_missing_files(tmp_path):
    with pytest.raises(ConfigError, match=r"folder with config\.json, got"):
        hugging_face.read_config(tmp_path)
    with pytest.raises(ConfigError, match=r"folder with model\.safetensors, got"):
        hugging_face.load(tmp_path, GPT2)
    index = {"weight_map": {"wte.weight": "model-1-of-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"folder with model-1-of-1\.safetensors"):
        hugging_face.load(tmp_path, GPT2)


def written(tmp_path, **entries):
    (tmp_path / "config.json").write_text(json.dumps(entries))
    return tmp_path


GPT2_JSON = {
    "model_type": "gpt2",
    "n_layer": 12,
    "n_embd": 768,
    "n_head": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
    "n_ctx": 1024,
}
T5_JSON = {
    "model_type": "t5",
    "num_layers": 6,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_heads": 8,
    "vocab_size": 32128,
}


def test_published_files(tmp_path):
    gpt2 = hugging_face.read_config(written(tmp_path, **GPT2_JSON))
    assert gpt2 == PUBLISHED["gpt2"]
    t5 = hugging_face.read_config(written(tmp_path, **T5_JSON))
    assert t5 == PUBLISHED["t5-small"]
    gated = T5_JSON | {
        "num_layers": 8,
        "num_decoder_layers": 8,
        "d_ff": 1024,
        "num_heads": 6,
        "feed_forward_proj": "gated-gelu",
    }
    for entries in ({"tie_word_embeddings": False}, {"scale_decoder_outputs": False}):
        config = hugging_face.read_config(written(tmp_path, **gated, **entries))
        assert config == PUBLISHED["t5-v1_1-small"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model_type": "bert"}, "must be gpt2, llama or t5, got 'bert'"),
        (GPT2_JSON | {"n_inner": 7}, r"`n_inner` .* 4 n_embd \(3072\), got 7"),
        (GPT2_JSON | {"n_head": None}, "`n_head` is missing in config.json"),
        (
            GPT2_JSON | {"activation_function": "relu"},
            "`activation_function` .* must be 'gelu_new', got 'relu'",
        ),
        (T5_JSON | {"layer_norm_epsilon": 1e-5}, "`layer_norm_epsilon` .* got 1e-05"),
        (
            T5_JSON | {"feed_forward_proj": "gated-silu"},
            "`feed_forward_proj` .* relu, gated-gelu, got 'gated-silu'",
        ),
        (GPT2_JSON | {"n_head": 11}, "`--model.heads` must divide"),
    ],
)
def test_refused_settings(entries, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        hugging_face.read_config(written(tmp_path, **entries))
