"""From documents to batches: tokenise, pack, store, read in a fixed order.

The packed examples are a TensorFlow Datasets builder written to array_record, which
needs no TensorFlow, and are read at random through grain. Batch number i is a pure
function of the seed and i: to resume is to go on with the next number.
"""

import contextlib
import hashlib
import io
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
import tensorflow_datasets as tfds
import tokenizers
from tokenizers import Tokenizer

from experiments.common import processes
from experiments.common.errors import ConfigError
from experiments.data import corpus
from experiments.main_job.config import Config


def pack(
    documents: Iterable[Sequence[int]], context: int, end_of_text: int
) -> np.ndarray:
    """Joins documents into one stream and cuts it into examples.

    Neighbours share one token, the last label of the one and the first input of the
    other: every token of the stream but the first is predicted exactly once. The last
    example is filled up with `end_of_text`.

    Args:
        documents: token ids of each document.
        context: inputs in an example.
        end_of_text: the token that is put after every document.

    Returns:
        int32, (examples, context + 1).
    """
    stream = np.concatenate(
        [np.append(np.asarray(ids, np.int32), end_of_text) for ids in documents]
        or [np.zeros(0)]
    ).astype(np.int32)
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
        self,
        splits: dict[str, list[str]],
        tokenizer: Tokenizer,
        context: int,
        data_dir: pathlib.Path,
    ):
        """Describes the data set; `download_and_prepare` then makes it.

        Args:
            splits: the documents of each split.
            tokenizer: a byte-level BPE.
            context: inputs in an example.
            data_dir: where the data set is written, as array_record.
        """
        self._splits = splits
        self._tokenizer = tokenizer
        self._context = context
        super().__init__(data_dir=data_dir, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        tokens = tfds.features.Tensor(shape=(self._context + 1,), dtype=np.int32)
        return tfds.core.DatasetInfo(
            builder=self,
            description="Python sources, tokenised by a byte-level BPE and packed.",
            features=tfds.features.FeaturesDict({"tokens": tokens}),
            disable_shuffling=True,  # example i is the i-th cut of the stream
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Any]:
        del dl_manager  # nothing is downloaded, ever
        return {
            name: self._generate_examples(documents)
            for name, documents in self._splits.items()
        }

    def _generate_examples(
        self, documents: list[str]
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        examples = pack(
            (encoding.ids for encoding in self._tokenizer.encode_batch(documents)),
            self._context,
            self._tokenizer.token_to_id(corpus.END_OF_TEXT),
        )
        for index, tokens in enumerate(examples):
            yield index, {"tokens": tokens}


class Data(NamedTuple):
    """All that training needs to know of the corpus."""

    train: Sequence[dict[str, np.ndarray]]
    """Random access to the packed training examples."""
    validation: np.ndarray
    """The fixed validation set, int32 (examples, context + 1)."""
    tokenizer: Tokenizer
    fingerprint: str
    """Identifies the corpus, the tokenizer and the packing."""


def load(config: Config) -> Data:
    """Returns the packed corpus, preparing it if no earlier run has.

    Raises:
        ConfigError: the corpus is empty, or smaller than what `config` asks of it; or
            the processes of this run have different ones.
    """
    with processes.first_goes_first():
        data = _load(config)
    processes.check_same("the corpus", data.fingerprint)
    return data


def _load(config: Config) -> Data:
    root = config.corpus_dir or corpus.standard_library()
    documents = corpus.read_documents(root)
    splits = corpus.split_documents(documents)
    for split, texts in splits.items():
        if not texts:
            raise ConfigError(
                f"`--corpus-dir` {root} has {len(documents)} Python sources and none "
                f"for the {split} split; give a folder with more of them"
            )
    name = _fingerprint(documents, config)
    folder = config.data_dir / name
    tokenizer = _tokenizer(splits["train"], folder, config.model.vocab_size)
    builder = PackedSources(splits, tokenizer, config.model.context, folder)
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # it would speak of a download
        builder.download_and_prepare()
    source = builder.as_data_source()
    validation = _validation_set(source["validation"], config.eval_examples)
    return Data(source["train"], validation, tokenizer, name)


def _fingerprint(documents: list[str], config: Config) -> str:
    digest = hashlib.sha256(tokenizers.__version__.encode())
    for text in documents:
        digest.update(corpus.content_hash(text).encode())
    vocab_size, context = config.model.vocab_size, config.model.context
    return f"v{vocab_size}-c{context}-{digest.hexdigest()[:12]}"


def _tokenizer(
    documents: list[str], folder: pathlib.Path, vocab_size: int
) -> Tokenizer:
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


def _validation_set(
    source: Sequence[dict[str, np.ndarray]], examples: int
) -> np.ndarray:
    if examples > len(source):
        raise ConfigError(
            f"`--eval-examples` must be at most {len(source)}, the size of the "
            f"validation split, got {examples}"
        )
    # Spread evenly, so that the set draws on as many documents as it can.
    indices = np.linspace(0, len(source) - 1, examples).astype(int)
    return np.stack([source[int(index)]["tokens"] for index in indices])


def batches(data: Data, batch_size: int, seed: int) -> grain.MapDataset:
    """Returns the batches of a run: item i, (batch, context + 1), is update i's.

    Epochs follow one another without end, each in another order.
    """
    return (
        grain.MapDataset.source(data.train)
        .map(lambda example: example["tokens"])
        .shuffle(seed=seed)
        .repeat()
        .batch(batch_size)
    )
