"""The corpus: deterministic, packed without loss, and split by content."""

import subprocess
import sys

import numpy as np
import pytest

from experiments.common.errors import ConfigError
from experiments.data import batches, corpus
from experiments.data import packing as data


@pytest.fixture(scope="module")
def documents(sources):
    return corpus.read_documents(sources)


def load(corpus_dir, tiny, context=16):
    return data.load(corpus_dir, tiny.data_dir, vocab_size=300, context=context)


@pytest.fixture(scope="module")
def dataset(sources, tiny):
    return load(sources, tiny)


def test_documents_do_not_depend_on_names(documents, sources, tmp_path):
    for i, path in enumerate(sorted(sources.iterdir(), reverse=True)):
        (tmp_path / f"package_{i % 3}").mkdir(exist_ok=True)
        copy = tmp_path / f"package_{i % 3}" / f"{i}.py"
        copy.write_bytes(path.read_bytes())
        copy.with_name(f"twin_{i}.py").write_bytes(path.read_bytes())
    assert corpus.read_documents(tmp_path) == documents


def test_tests_and_broken_sources_are_left_out(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_a.py").write_text("a = 1\n")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "b.py").write_text("b = 1\n")
    (tmp_path / "broken.py").write_bytes(b"# \xff is no UTF-8\n")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "latin.py").write_bytes(b"# coding: latin-1\n# \xe9\n")
    assert corpus.read_documents(tmp_path) == ["# coding: latin-1\n# é\n"]


def test_standard_library_is_a_corpus():
    documents = corpus.read_documents(corpus.standard_library() / "email")
    assert any("class EmailMessage" in text for text in documents)


def test_splits_are_disjoint_and_complete(documents):
    splits = corpus.split_documents(documents)
    train, validation = set(splits["train"]), set(splits["validation"])
    assert validation
    assert not train & validation
    assert train | validation == set(documents)


def test_split_share():
    splits = [corpus.split_of(f"document {i}") for i in range(4000)]
    share = splits.count("validation") / len(splits)
    error = np.sqrt(0.05 * 0.95 / len(splits))
    assert abs(share - corpus.VALIDATION_SHARE) < 5 * error


def test_tokenizer_round_trip(dataset):
    for text in (
        "def f(x):\n\treturn  x\r\n",
        "naïve café 漢字 🙂",
        "\x00\x7f",
        "<|x|>",
    ):
        assert dataset.tokenizer.decode(dataset.tokenizer.encode(text).ids) == text


def test_tokenizer_is_deterministic(documents):
    first, second = (corpus.train_tokenizer(documents, 280).to_str() for _ in range(2))
    assert first == second


def test_tokenizer_keeps_to_its_size(dataset):
    assert 257 < dataset.tokenizer.get_vocab_size() <= 300
    assert dataset.tokenizer.token_to_id(corpus.END_OF_TEXT) == 0


@pytest.mark.parametrize("length", [0, 1, 2, 5, 8, 9, 10, 25])
def test_pack_loses_nothing(length):
    ids = np.arange(1, length + 1)
    parts = np.split(ids, [length // 3, length // 2])
    blocks = data.pack(parts, context=4, end_of_text=0)
    stream = np.concatenate([np.append(part, 0) for part in parts])
    assert blocks.dtype == np.int32
    assert blocks.shape == (-(-(len(stream) - 1) // 4), 5)
    np.testing.assert_array_equal(blocks[1:, 0], blocks[:-1, -1])
    joined = np.append(blocks[:, :-1], blocks[-1, -1])
    np.testing.assert_array_equal(joined[: len(stream)], stream)
    np.testing.assert_array_equal(joined[len(stream) :], 0)


def test_pack_of_nothing():
    assert data.pack([], context=4, end_of_text=0).shape == (0, 5)


def test_stored_examples_are_the_training_documents(dataset, documents):
    train = corpus.split_documents(documents)["train"]
    examples = np.stack([example["tokens"] for example in dataset.train])
    stream = np.append(examples[:, :-1], examples[-1, -1])
    ends = np.flatnonzero(stream == 0)[: len(train)]
    starts = np.append(0, ends[:-1] + 1)
    decoded = [
        dataset.tokenizer.decode(stream[start:end])
        for start, end in zip(starts, ends, strict=True)
    ]
    assert decoded == train


def test_second_load_reads_what_the_first_wrote(sources, tiny, dataset, monkeypatch):
    def fail(*args):
        raise AssertionError("prepared twice")

    monkeypatch.setattr(corpus, "train_tokenizer", fail)
    monkeypatch.setattr(data, "pack", fail)
    again = load(sources, tiny)
    assert again.fingerprint == dataset.fingerprint
    assert len(again.validation) == len(dataset.validation)
    np.testing.assert_equal(again.validation[0], dataset.validation[0])


def test_fingerprint_follows_content_and_settings(tiny, dataset, sources, tmp_path):
    shorter = load(sources, tiny, context=8)
    for path in sources.iterdir():
        (tmp_path / path.name).write_text(path.read_text(encoding="utf-8") + "\n")
    edited = load(tmp_path, tiny)
    names = {dataset.fingerprint, shorter.fingerprint, edited.fingerprint}
    assert len(names) == 3
    assert shorter.validation[0]["tokens"].shape == (9,)


def test_an_epoch_shows_every_example_once(dataset):
    count = len(dataset.train)
    order = batches.batched(dataset.train, 4, seed=0)
    rows = np.concatenate([order[i]["tokens"] for i in range(2 * count // 4 + 1)])
    stored = np.stack([example["tokens"] for example in dataset.train])
    for epoch in (rows[:count], rows[count : 2 * count]):
        np.testing.assert_array_equal(
            epoch[np.lexsort(epoch.T)], stored[np.lexsort(stored.T)]
        )
    assert not np.array_equal(rows[:count], rows[count : 2 * count])


def test_spread():
    assert batches.spread(range(10), 4) == [0, 3, 6, 9]
    assert batches.spread("abc", 5) == ["a", "b", "c"]


def test_corpus_is_too_small(tiny, tmp_path):
    with pytest.raises(ConfigError, match="has 0 Python sources and none for"):
        load(tmp_path, tiny)


@pytest.mark.full
def test_tensorflow_is_not_imported(tiny, dataset):
    code = (
        "import pathlib, sys\n"
        "from experiments.data import packing\n"
        "from experiments.main_job import run\n"
        "corpus, data = map(pathlib.Path, sys.argv[1:])\n"
        "packing.load(corpus, data, vocab_size=300, context=16)\n"
        "sys.exit('tensorflow' in sys.modules)\n"
    )
    folders = [str(tiny.corpus_dir), str(tiny.data_dir)]
    subprocess.run([sys.executable, "-W", "error", "-c", code, *folders], check=True)
