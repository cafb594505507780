"""Real text that every machine has: the sources of Python's standard library.

Documents are told apart, ordered and split by a hash of their content, so that
neither the file system nor the place of the installation has a say.
"""

import hashlib
import pathlib
import sysconfig
import tokenize
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
"""Stands after every document; GPT-2's name for it."""

VALIDATION_SHARE = 0.05
"""Part of the documents that is held out."""

# Tests are long and say little; site-packages differs from machine to machine, as
# does the compiled-in configuration.
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)
_SKIPPED_PREFIX = "_sysconfigdata"


def standard_library() -> pathlib.Path:
    """Returns the folder of the running Python's standard library."""
    return pathlib.Path(sysconfig.get_paths()["stdlib"])


def read_documents(root: pathlib.Path) -> list[str]:
    """Reads the Python sources below `root`, each content once, ordered by hash.

    Files that are no valid Python source text (a few exist, on purpose) are left out.
    """
    documents = {}
    for path in root.rglob("*.py"):
        folders = path.relative_to(root).parts[:-1]
        generated = path.name.startswith(_SKIPPED_PREFIX)
        if generated or not _SKIPPED_FOLDERS.isdisjoint(folders):
            continue
        try:
            with tokenize.open(path) as file:  # honours a coding declaration
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        if text:
            documents[content_hash(text)] = text
    return [documents[digest] for digest in sorted(documents)]


def content_hash(text: str) -> str:
    """Returns the SHA-256 of a text, as 64 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def position_of(text: str) -> float:
    """Returns a number in [0, 1), uniform over texts and decided by the content."""
    return int(content_hash(text)[:8], 16) / 16**8


def split_of(text: str) -> str:
    """Returns "train" or "validation", decided by the content alone."""
    return "validation" if position_of(text) < VALIDATION_SHARE else "train"


def split_documents(documents: Iterable[str]) -> dict[str, list[str]]:
    """Sorts documents into {"train": ..., "validation": ...}."""
    splits: dict[str, list[str]] = {"train": [], "validation": []}
    for text in documents:
        splits[split_of(text)].append(text)
    return splits


def byte_level(model: models.BPE) -> Tokenizer:
    """Returns the tokenizer that merges bytes as the model says, as GPT-2's."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE, as GPT-2's, on the documents.

    Every text survives encoding and decoding, since all 256 bytes are tokens. A small
    corpus may yield fewer than `vocab_size` tokens, never more.
    """
    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer
