"""From documents to batches: tokenise, pack, store, read in a fixed order.

The packed examples are a TensorFlow Datasets builder written to array_record, which
needs no TensorFlow, and are read at random through grain. Batch number i is a pure
function of the seed and i: to resume is to go on with the next number.
"""

import contextlib
import dataclasses
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

from experiments import corpus
from experiments.config import Config, ConfigError


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
    examples = -(-max(len(stream) - 1, 0) // context)
    padded = np.full(examples * context + 1, end_of_text, np.int32)
    padded[: len(stream)] = stream
    windows = np.lib.stride_tricks.sliding_window_view(padded, context + 1)
    return windows[::context][:examples]


@dataclasses.dataclass(eq=False)
class PackedConfig(tfds.core.BuilderConfig):
    """What `PackedSources` is made of; `name` is unique to its content."""

    context: int = 128
    source_dir: str = ""
    tokenizer_file: str = ""


class PackedSources(tfds.core.GeneratorBasedBuilder):
    """Python sources as packed token sequences of one length."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        tokens = tfds.features.Tensor(
            shape=(self.builder_config.context + 1,), dtype=np.int32
        )
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
        documents = corpus.read_documents(pathlib.Path(self.builder_config.source_dir))
        splits = corpus.split_documents(documents)
        return {name: self._generate_examples(texts) for name, texts in splits.items()}

    def _generate_examples(
        self, documents: list[str]
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        tokenizer = Tokenizer.from_file(self.builder_config.tokenizer_file)
        encodings = tokenizer.encode_batch(documents)
        examples = pack(
            (encoding.ids for encoding in encodings),
            self.builder_config.context,
            tokenizer.token_to_id(corpus.END_OF_TEXT),
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
        ConfigError: the corpus is empty, or smaller than what `config` asks of it.
    """
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
    tokenizer, tokenizer_file = _tokenizer(splits["train"], name, config)
    builder = PackedSources(
        data_dir=config.data_dir,
        file_format="array_record",
        config=PackedConfig(
            name=name,
            context=config.model.context,
            source_dir=str(root),
            tokenizer_file=str(tokenizer_file),
        ),
    )
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
    documents: list[str], name: str, config: Config
) -> tuple[Tokenizer, pathlib.Path]:
    """Returns the tokenizer of the training documents, and the file that keeps it."""
    file = config.data_dir / f"tokenizer-{name}.json"
    if file.exists():
        return Tokenizer.from_file(str(file)), file
    tokenizer = corpus.train_tokenizer(documents, config.model.vocab_size)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".tmp")
    tokenizer.save(str(unfinished))
    unfinished.replace(file)  # an interrupted run leaves no half of a tokenizer
    return tokenizer, file


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
