"""Mined docstrings: what becomes a pair, and that splits share nothing."""

import subprocess
import sys

import pytest

from experiments.data import docstrings
from experiments.data.pairs import HELD_OUT_SHARE, Pair, split_of, split_pairs

BODY = "The long explanation that follows says a good deal more than that."
SOURCE = f'''
class Some:
    """Does a thing that is
    worth a summary.

    {BODY}

        An indented line.
    """

    async def method(self):
        """Returns nothing at all.

        {BODY} Twice.
        """

def short():
    """Has no body that says enough.

    Too short.
    """

def one_line():
    """Has only a summary, and nothing below."""

def terse():
    """Brief.

    {BODY}
    """

def escape():
    "\\d is no escape sequence.\\n\\n{BODY} Third."
'''


def test_pairs_of_a_source():
    assert list(docstrings.pairs_of(SOURCE)) == [
        Pair(
            f"{BODY}\n\n    An indented line.", "Does a thing that is worth a summary."
        ),
        Pair(f"{BODY} Third.", "\\d is no escape sequence."),
        Pair(f"{BODY} Twice.", "Returns nothing at all."),
    ]


def test_long_bodies_are_cut_and_long_summaries_left_out():
    text = '"""{}\n\n{}"""'
    function = "def f():\n    " + text
    [pair] = docstrings.pairs_of(function.format("A" * 300, "b" * 3000))
    assert pair == Pair("b" * 2000, "A" * 300)
    assert not list(docstrings.pairs_of(function.format("A" * 301, "b" * 3000)))


def test_what_cannot_be_parsed_has_no_pairs():
    assert not list(docstrings.pairs_of(SOURCE + "\ndef {{ name }}(:\n"))


def test_each_body_is_mined_once_and_nothing_is_imported(tmp_path):
    (tmp_path / "a.py").write_text(SOURCE + "raise SystemExit(1)\n")
    (tmp_path / "b.py").write_text("import absent\n" + SOURCE)
    assert len(docstrings.mine([tmp_path])) == 3


def test_load_keeps_what_it_mined(tmp_path, monkeypatch):
    for i in range(200):
        text = SOURCE.replace(BODY, f"{BODY} Number {i}.")
        text = text.replace("nothing at all", f"{i} things")
        (tmp_path / f"{i}.py").write_text(text)
    monkeypatch.setattr(docstrings, "_folders", lambda: [tmp_path])
    splits = docstrings.load(tmp_path / "data")
    assert sum(map(len, splits.values())) == 600
    monkeypatch.setattr(docstrings, "_folders", lambda: [])
    assert docstrings.load(tmp_path / "data") == splits
    targets = [{pair.target for pair in pairs} for pairs in splits.values()]
    assert all(targets)
    assert sum(map(len, targets)) == 202  # no summary lies in two splits


def test_another_version_is_mined_anew(monkeypatch):
    before = docstrings._fingerprint()
    monkeypatch.setattr(docstrings.importlib.metadata, "version", lambda name: "0")
    assert docstrings._fingerprint() != before


@pytest.mark.full
def test_installed_docstrings(monkeypatch):
    folders = docstrings._folders()
    assert len(folders) == 1 + len(docstrings.PACKAGES)
    flax, chex = folders[4], folders[6]
    assert (flax.name, chex.name) == ("flax", "chex")
    assert 200 < len(docstrings.mine([flax, chex])) < 3000


def test_finding_packages_imports_none():
    code = (
        "import sys\n"
        "from experiments.data import docstrings\n"
        "docstrings._folders()\n"
        "sys.exit(bool({'numpy', 'jax', 'flax', 'optax'} & set(sys.modules)))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_splits_by_content():
    pairs = [Pair(f"source {i}", f"target {i % 4000}") for i in range(8000)]
    splits = split_pairs(pairs + pairs, key=lambda pair: pair.target)
    assert sorted(sum(splits.values(), [])) == sorted(pairs)
    assert split_pairs(pairs[::-1], key=lambda pair: pair.target) == splits
    for name, members in splits.items():
        assert {split_of(pair.target) for pair in members} == {name}
    error = (HELD_OUT_SHARE * (1 - HELD_OUT_SHARE) / 4000) ** 0.5
    for name in ("validation", "test"):
        share = len(splits[name]) / len(pairs)
        assert share == pytest.approx(HELD_OUT_SHARE, abs=5 * error)
