"""TFDS builders from files that the test writes: no network and no TensorFlow."""

import io
import json
import subprocess
import sys
import tarfile
from unittest import mock

import pytest
import requests
import tensorflow_datasets as tfds

from experiments.common.errors import ConfigError
from experiments.data import builders
from experiments.data.pairs import Pair, split_of

ARTICLE = """[XSUM]URL[XSUM]
http://example.org/{i}

[XSUM]INTRODUCTION[XSUM]
Summary {i}, café.
[XSUM]RESTBODY[XSUM]
First line of {i}.
Share this with
Email

Second line.
"""


@pytest.fixture(autouse=True)
def _no_network():
    """Whatever tries to download fails at once."""

    def fail(self, *args, **kwargs):
        raise AssertionError("tried to download")

    manager = tfds.download.DownloadManager
    with mock.patch.object(manager, "_download_or_get_cache", fail):
        yield


@pytest.fixture
def manual(tmp_path):
    """What has to be fetched by hand for XSum: six articles, one of them missing."""
    folder = tmp_path / "manual" / "xsum"
    folder.mkdir(parents=True)
    with tarfile.open(folder / builders.ARTICLES, "w:gz") as archive:
        for i in range(5):
            content = ARTICLE.format(i=i).encode()
            member = tarfile.TarInfo(f"xsum-extracts-from-downloads/{i}.data")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    ids = {"train": ["0", "2", "3", "5"], "validation": ["1"], "test": ["4"]}
    (folder / builders.SPLIT_IDS).write_text(json.dumps(ids))
    return folder


def test_xsum(tmp_path, manual):
    def pair(i):
        return Pair(f"First line of {i}.\nSecond line.", f"Summary {i}, café.")

    splits = builders.load_xsum(tmp_path)
    assert sorted(splits["train"]) == [pair(0), pair(2), pair(3)]
    assert splits["validation"] == [pair(1)]
    assert splits["test"] == [pair(4)]
    (manual / builders.ARTICLES).unlink()
    assert builders.load_xsum(tmp_path) == splits  # from what was prepared


def test_xsum_was_not_fetched(tmp_path, manual):
    (manual / builders.ARTICLES).unlink()
    message = (
        r"lacks xsum-extracts-from-downloads\.tar\.gz; https://github\.com/EdinburghNLP"
        r".*; put both into .*manual.xsum$"
    )
    with pytest.raises(ConfigError, match=message):
        builders.load_xsum(tmp_path)
    (manual / builders.SPLIT_IDS).unlink()
    with pytest.raises(ConfigError, match=r"downloads\.tar\.gz and XSum-TRAINING"):
        builders.load_xsum(tmp_path)


def test_archive_has_none_of_the_articles(tmp_path, manual):
    with tarfile.open(manual / builders.ARTICLES, "w:gz"):
        pass
    with pytest.raises(
        ConfigError, match=r"tar\.gz has none of the 4 articles of a sp"
    ):
        builders.load_xsum(tmp_path)


def test_article_is_of_another_form():
    text = ARTICLE.replace("[XSUM]RESTBODY[XSUM]", "")
    with pytest.raises(
        ConfigError, match=r"lacks \[XSUM\]INTRO.*: '\[XSUM\]URL.*; mak"
    ):
        builders.article(text)


def test_billsum(tmp_path):
    fixture = tmp_path / "fixture"
    fixture.mkdir()
    for name, key, count in (("us_train", "bill_id", 60), ("us_test", "bill_id", 3)):
        bills = [
            {key: f"{i}", "text": f"{name} {i}\n", "summary": f"§ {i}", "title": "t"}
            for i in range(count)
        ]
        lines = "\n".join(map(json.dumps, bills))
        (fixture / f"{name}_data_final_OFFICIAL.jsonl").write_text(lines)
    bill = {"external_id": "a", "text": "California", "summary": "b", "title": "c"}
    (fixture / "ca_test_data_final_OFFICIAL.jsonl").write_text(json.dumps(bill))
    with _downloaded(str(fixture)):
        splits = builders.load_billsum(tmp_path, download=True)
    train = {Pair(f"us_train {i}", f"§ {i}") for i in range(60)}
    held_out = {pair for pair in train if split_of(pair.source) == "validation"}
    assert held_out
    assert set(splits["validation"]) == held_out
    assert set(splits["train"]) == train - held_out
    assert sorted(splits["test"]) == [Pair(f"us_test {i}", f"§ {i}") for i in range(3)]
    assert builders.load_billsum(tmp_path, download=False) == splits


def test_opus(tmp_path):
    fixture = tmp_path / "fixture"
    fixture.mkdir()
    for corpus in ("GNOME", "KDE4", "PHP", "Ubuntu", "OpenOffice"):
        for language in ("de", "en"):
            lines = [f"{corpus} {language} {i}" for i in range(20)]
            file = fixture / f"{corpus}.de-en.{language}"
            file.write_text("\n".join([*lines, "same", " "]))
    with _downloaded(str(fixture)):
        splits = builders.load_opus(tmp_path, download=True)
    pairs = {
        Pair(f"{corpus} de {i}", f"{corpus} en {i}")
        for corpus in ("GNOME", "KDE4", "PHP", "Ubuntu", "OpenOffice")
        for i in range(20)
    }
    everything = sum(splits.values(), [])
    assert len(everything) == len(set(everything))
    assert set(everything) == pairs | {Pair("same", "same")}
    for name, members in splits.items():
        assert {split_of(pair.source) for pair in members} == {name}


def _downloaded(folder):
    manager = tfds.download.DownloadManager
    return mock.patch.object(manager, "download_and_extract", return_value=folder)


@pytest.mark.parametrize("name", ["billsum", "opus"])
def test_nothing_is_downloaded_unasked(tmp_path, name):
    load = getattr(builders, f"load_{name}")
    with pytest.raises(ConfigError, match=f"has no {name}.*; give `--download` to fet"):
        load(tmp_path, download=False)


def test_no_network(tmp_path):
    error = requests.exceptions.ConnectionError("no route")
    billsum = tfds.builder_cls("billsum")
    with (
        mock.patch.object(billsum, "download_and_prepare", side_effect=error),
        pytest.raises(ConfigError, match=r"`--download` could not fetch billsum"),
    ):
        builders.load_billsum(tmp_path, download=True)


def test_mocked_data_source(tmp_path):
    with tfds.testing.mock_data(num_examples=5):
        splits = builders.load_billsum(tmp_path, download=True)
    assert len(splits["test"]) == 5
    assert all(isinstance(text, str) for pair in splits["test"] for text in pair)


def test_tensorflow_is_not_imported(tmp_path, manual):
    code = (
        "import pathlib, sys\n"
        "from experiments.data import builders\n"
        "builders.load_xsum(pathlib.Path(sys.argv[1]))\n"
        "sys.exit('tensorflow' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code, tmp_path], check=True)
