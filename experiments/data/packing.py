"""From documents to examples of one length: tokenize, pack, store.

The packed examples are a TensorFlow Datasets builder written to array_record, which
needs no TensorFlow and gives random access to them.
"""

import contextlib
import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
import tokenizers
from tokenizers import Tokenizer

from experiments.common.errors import ConfigError
from experiments.data import corpus

Splits = dict[str, list[str]]
"""The documents of each split."""


def pack(
    documents: Iterable[Sequence[int]], context: int, end_of_text: int
) -> np.ndarray:
    """Joins documents into one stream and cuts it into examples.

    Neighbors share one token, the last label of the one and the first input of the
    other: every token of the stream but the first is predicted exactly once. The last
    example is filled up with `end_of_text`.

    Args:
        documents: token ids of each document.
        context: inputs in an example.
        end_of_text: the token that is put after every document.

    Returns:
        int32, (examples, context + 1).
    """
    parts = [np.append(np.asarray(ids, np.int32), end_of_text) for ids in documents]
    stream = np.concatenate(parts or [np.zeros(0)]).astype(np.int32)
    examples = -(-(len(stream) - 1) // context) if len(stream) else 0
    padded = np.full(examples * context + 1, end_of_text, np.int32)
    padded[: len(stream)] = stream
    starts = np.arange(examples)[:, None] * context
    return padded[starts + np.arange(context + 1)]


class PackedSources(tfds.core.GeneratorBasedBuilder):
    """Python sources as packed token sequences of one length.

    `data_dir` has to be unique to the documents, the tokenizer and the context: what
    lies there is taken for what would be made.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self, splits: Splits, tokenizer: Tokenizer, context: int, data_dir: Path
    ):
        """Describes the data set; `download_and_prepare` then makes it.

        Args:
            splits: the documents of each split.
            tokenizer: a byte-level BPE.
            context: inputs in an example.
            data_dir: where the data set is written, as array_record.
        """
        self._splits, self._tokenizer, self._context = splits, tokenizer, context
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        tokens = tfds.features.Tensor(shape=(self._context + 1,), dtype=np.int32)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Python sources, tokenized by a byte-level BPE and packed.",
            features=tfds.features.FeaturesDict({"tokens": tokens}),
            disable_shuffling=True,  # example i is the i-th cut of the stream
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded, ever
        return {name: self._generate_examples(d) for name, d in self._splits.items()}

    def _generate_examples(
        self, documents: list[str]
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        ids = (each.ids for each in self._tokenizer.encode_batch(documents))
        end_of_text = self._tokenizer.token_to_id(corpus.END_OF_TEXT)
        for index, tokens in enumerate(pack(ids, self._context, end_of_text)):
            yield index, {"tokens": tokens}


class Packed(NamedTuple):
    """The packed corpus, by split: random access to {"tokens": int32 (context + 1)}."""

    train: Sequence[dict[str, np.ndarray]]
    validation: Sequence[dict[str, np.ndarray]]
    tokenizer: Tokenizer
    fingerprint: str
    """Identifies the corpus, the tokenizer and the packing."""


def load(
    corpus_dir: Path | None, data_dir: Path, *, vocab_size: int, context: int
) -> Packed:
    """Returns the packed corpus, preparing it if no earlier run has.

    Args:
        corpus_dir: Python sources; None for the standard library.
        data_dir: where what is prepared is kept.
        vocab_size: tokens of the tokenizer that is trained.
        context: inputs in an example.

    Raises:
        ConfigError: the corpus has no document for one of the splits.
    """
    root = corpus_dir or corpus.standard_library()
    documents = corpus.read_documents(root)
    splits = corpus.split_documents(documents)
    for split, texts in splits.items():
        if not texts:
            raise ConfigError(
                f"`--corpus-dir` {root} has {len(documents)} Python sources and none "
                f"for the {split} split; give a folder with more of them"
            )
    digest = hashlib.sha256(tokenizers.__version__.encode())
    for text in documents:
        digest.update(corpus.content_hash(text).encode())
    fingerprint = f"v{vocab_size}-c{context}-{digest.hexdigest()[:12]}"
    folder = data_dir / fingerprint
    tokenizer = _tokenizer(splits["train"], folder, vocab_size)
    builder = PackedSources(splits, tokenizer, context, folder)
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # it would speak of a download
        builder.download_and_prepare()
    source = builder.as_data_source()
    return Packed(source["train"], source["validation"], tokenizer, fingerprint)


def _tokenizer(documents: list[str], folder: Path, vocab_size: int) -> Tokenizer:
    """Returns the tokenizer of the training documents, kept in `folder`."""
    file = folder / "tokenizer.json"
    if file.exists():
        return Tokenizer.from_file(str(file))
    tokenizer = corpus.train_tokenizer(documents, vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".tmp")
    tokenizer.save(str(unfinished))
    unfinished.replace(file)  # an interrupted run leaves no half of a tokenizer
    return tokenizer
