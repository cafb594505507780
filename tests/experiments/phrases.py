"""A translation small enough for tests: numbers in German and in English."""

import dataclasses

from experiments.data.pairs import Pair
from experiments.data.registry import DATASETS
from experiments.finetune import prepare
from experiments.models.config import GPT2Config

_WORDS = {
    "eins": "one",
    "zwei": "two",
    "drei": "three",
    "vier": "four",
    "fünf": "five",
    "sechs": "six",
}


def shrink(monkeypatch):
    """Puts this in place of the phrases, and one layer in place of gpt2-tiny."""
    pairs = [
        Pair(f"{a} {b} {c}", f"{_WORDS[a]} {_WORDS[b]} {_WORDS[c]}")
        for a in _WORDS
        for b in _WORDS
        for c in _WORDS
    ]
    splits = {"train": pairs[16:], "validation": pairs[:8], "test": pairs[8:16]}
    small = dataclasses.replace(
        DATASETS["phrases"], load=lambda folder, download=False: splits
    )
    monkeypatch.setattr(prepare, "DATASETS", {"phrases": small})
    size = GPT2Config(layers=1, width=128, heads=2, context=128)
    monkeypatch.setitem(prepare._TINY, "gpt2-tiny", size)
