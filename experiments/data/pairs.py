"""What every data set here becomes: pairs of texts, in three splits."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from experiments.data.corpus import content_hash, position_of

HELD_OUT_SHARE = 0.05
"""Part of the content that validation gets; test gets as much."""


class Pair(NamedTuple):
    """A text and what a model is to make of it."""

    source: str
    target: str


Splits = dict[str, list[Pair]]
"""The pairs by "train", "validation" and "test"."""


def split_of(key: str) -> str:
    """Returns the split of a piece of content: 90, 5 and 5 percent, by its hash."""
    position = position_of(key)
    if position < HELD_OUT_SHARE:
        return "validation"
    return "test" if position < 2 * HELD_OUT_SHARE else "train"


def split_pairs(pairs: Iterable[Pair], key: Callable[[Pair], str]) -> Splits:
    """Sorts pairs into splits, each ordered by hash and free of duplicates.

    Args:
        pairs: in any order, repetitions included.
        key: the part of a pair that decides. Pairs of one key share a split, so that
            no key of the validation or test split is met in training.

    Returns:
        All three splits, of which some may be empty.
    """
    splits: Splits = {"train": [], "validation": [], "test": []}
    ordered = sorted(set(pairs), key=lambda pair: content_hash("\0".join(pair)))
    for pair in ordered:
        splits[split_of(key(pair))].append(pair)
    return splits
