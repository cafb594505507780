"""Vocabularies: trained, read from files, and back to text."""

import json

import numpy as np
import pytest
import sentencepiece as spm
from tokenizers import Tokenizer, models

from experiments.common.errors import ConfigError
from experiments.data import corpus, vocabulary
from experiments.data.vocabulary import Vocabulary

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "größere",
    "Vögel",
    "fliegen",
]
TEXTS = [f"{a} {b} {c}" for a in WORDS for b in WORDS for c in WORDS[:3]]


@pytest.fixture(scope="module")
def pieces():
    return vocabulary.sentencepiece(TEXTS, 64)


@pytest.fixture(scope="module")
def bytes_():
    return vocabulary.byte_pair(TEXTS, 300)


@pytest.fixture(params=["pieces", "bytes_"])
def either(request) -> Vocabulary:
    return request.getfixturevalue(request.param)


def test_special_tokens_of_t5(pieces):
    assert (pieces.pad, pieces.eos) == (0, 1)
    [ids] = pieces.encode(["the ☃"])
    assert 2 in ids  # a character that training has not seen
    assert pieces.size <= 64
    assert pieces.size - 3 > len(set("".join(TEXTS)))


def test_special_token_of_gpt2(bytes_):
    assert bytes_.pad == bytes_.eos == 0
    assert 257 < bytes_.size <= 300


def test_round_trip(either):
    rows = either.encode(TEXTS)
    assert all(0 <= i < either.size for ids in rows for i in ids)
    assert not any({either.pad, either.eos} & set(ids) for ids in rows)
    assert either.decode(rows) == TEXTS


def test_bytes_keep_every_text(bytes_):
    texts = ["naïve  漢字 🙂\r\n", "\x00", "", "a <|endoftext|> b"]
    rows = bytes_.encode(texts)
    assert not any(bytes_.eos in ids for ids in rows)
    assert bytes_.decode(rows) == texts


def test_names_of_special_tokens_are_text(pieces):
    [ids] = pieces.encode(["the</s><pad>"])
    assert not {pieces.pad, pieces.eos} & set(ids)


def test_decode_ends_at_eos_and_drops_what_is_no_text(either):
    [ids] = either.encode(["quick fox"])
    beyond = [either.size, either.size + 70]
    row = np.array([*ids, *beyond, either.eos, *ids, either.eos], np.int32)
    assert either.decode([row, [either.eos, *ids], []]) == ["quick fox", "", ""]


def test_decode_drops_leading_padding(pieces):
    [ids] = pieces.encode(["quick fox"])
    assert pieces.decode([[pieces.pad, *ids, pieces.pad]]) == ["quick fox"]


@pytest.mark.parametrize("train", [vocabulary.sentencepiece, vocabulary.byte_pair])
def test_training_is_deterministic(train):
    size = 280 if train is vocabulary.byte_pair else 50
    first, again = train(TEXTS, size), train(TEXTS, size)
    assert first.fingerprint == again.fingerprint
    assert first.encode(TEXTS) == again.encode(TEXTS)
    assert train(TEXTS[:200], size).fingerprint != first.fingerprint


def test_little_text_yields_fewer_tokens():
    assert vocabulary.sentencepiece(["a b c", "a b"], 5000).size < 20


def test_size_is_too_small_for_the_characters():
    with pytest.raises(
        ConfigError, match="`--vocab-size` 5 makes no SentencePiece voc"
    ):
        vocabulary.sentencepiece(TEXTS, 5)


def test_no_text():
    with pytest.raises(ConfigError, match="makes no SentencePiece .* or more text"):
        vocabulary.sentencepiece([], 50)


def test_size_is_too_small_for_the_bytes():
    with pytest.raises(ConfigError, match="`--vocab-size` must be at .* got 256"):
        vocabulary.byte_pair(TEXTS, 256)


def test_load_spiece_model(tmp_path, pieces):
    file = tmp_path / "spiece.model"
    file.write_bytes(pieces._model.serialized_model_proto())
    loaded = vocabulary.load_sentencepiece(file)
    assert loaded.fingerprint == pieces.fingerprint
    assert loaded.encode(TEXTS) == pieces.encode(TEXTS)


def test_no_spiece_model(tmp_path):
    with pytest.raises(ConfigError, match=r"`--tokenizer` .* is no file; give the"):
        vocabulary.load_sentencepiece(tmp_path / "spiece.model")
    file = tmp_path / "wrong.model"
    file.write_bytes(b"no model")
    with pytest.raises(ConfigError, match=r"wrong\.model is no SentencePiece model; "):
        vocabulary.load_sentencepiece(file)
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(tmp_path / "unpadded"),
        vocab_size=36,
        minloglevel=2,
    )
    with pytest.raises(ConfigError, match="unpadded.model has pad id -1 and end"):
        vocabulary.load_sentencepiece(tmp_path / "unpadded.model")


@pytest.fixture
def gpt2(tmp_path):
    """A folder with vocab.json and merges.txt, as GPT-2 is published."""
    tokenizer = corpus.train_tokenizer(TEXTS, 300)
    model = json.loads(tokenizer.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    return tmp_path


def test_load_vocab_and_merges(gpt2, bytes_):
    loaded = vocabulary.load_byte_pair(gpt2)
    texts = [*TEXTS, "a <|endoftext|> b"]
    assert loaded.encode(texts) == bytes_.encode(texts)
    assert loaded.decode(loaded.encode(texts)) == texts
    assert (loaded.size, loaded.eos) == (bytes_.size, bytes_.eos)


@pytest.mark.parametrize("name", ["", "tokenizer.json"])
def test_load_tokenizer_json(tmp_path, bytes_, name):
    corpus.train_tokenizer(TEXTS, 300).save(str(tmp_path / "tokenizer.json"))
    loaded = vocabulary.load_byte_pair(tmp_path / name)
    assert loaded.encode(TEXTS) == bytes_.encode(TEXTS)
    assert loaded.fingerprint == bytes_.fingerprint


def test_no_byte_pair(tmp_path):
    with pytest.raises(ConfigError, match=r"has neither tokenizer\.json nor vocab"):
        vocabulary.load_byte_pair(tmp_path)
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    with pytest.raises(ConfigError, match=r"is no byte-level BPE: .*; give the"):
        vocabulary.load_byte_pair(tmp_path)
    Tokenizer(models.BPE()).save(str(file))
    with pytest.raises(ConfigError, match=r"has none of the tokens <\|endoftext\|>, "):
        vocabulary.load_byte_pair(tmp_path)
