"""Plain texts to continue, which every machine has: English prose, and Python sources.

The prose is the language reference that Python's `help` shows. The sources are those of
the installed jax, of which the files that this year's releases brought are newer than
any model in `experiments.models.config`; the others may be in its training data.
"""

import pathlib
import pydoc_data.topics
from collections.abc import Iterable, Iterator

import jax

from experiments.data import corpus
from experiments.data.pairs import Pair, Splits, split_of

BLOCK = 600
"""Characters of a text, besides those that complete its last line."""


def load_prose(data_dir: pathlib.Path, download: bool = False) -> Splits:
    """Returns blocks of the language reference, split by pages of five of them."""
    del data_dir, download  # nothing to fetch
    return split(blocks("\n".join(pydoc_data.topics.topics.values()), 5 * BLOCK))


def load_code(data_dir: pathlib.Path, download: bool = False) -> Splits:
    """Returns blocks of jax's sources, split by their files."""
    del data_dir, download  # nothing to fetch
    return split(corpus.read_documents(pathlib.Path(jax.__file__).parent))


def split(documents: Iterable[str]) -> Splits:
    """Returns blocks of texts as pairs without sources.

    Args:
        documents: all blocks of one are in the same split.
    """
    splits: Splits = {"train": [], "validation": [], "test": []}
    for document in sorted(documents, key=corpus.content_hash):
        pairs = [Pair("", block) for block in blocks(document, BLOCK)]
        splits[split_of(document)] += pairs
    return splits


def blocks(text: str, size: int) -> Iterator[str]:
    """Yields blocks of whole lines; the rest at the end, shorter than one, is dropped.

    Args:
        text: the text.
        size: of a block, in characters, besides those that complete its last line.
    """
    block = ""
    for line in text.splitlines(keepends=True):
        block += line
        if len(block) >= size:
            yield block
            block = ""
