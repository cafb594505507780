"""From the settings to a model, a vocabulary and the pairs to train on."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Sequence

import jax

from experiments.common import processes
from experiments.common.errors import ConfigError
from experiments.common.problem import Data
from experiments.data import batches
from experiments.data import vocabulary as vocabularies
from experiments.data.pairs import Pair, Splits
from experiments.data.registry import DATASETS, Dataset
from experiments.finetune.config import Config
from experiments.models import hugging_face
from experiments.models.build import abstract, create
from experiments.models.config import PUBLISHED, GPT2Config, T5Config

_TINY = {"t5-tiny": T5Config(), "gpt2-tiny": GPT2Config(2, 128, 4, 256)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared(Data):
    """What all methods start from, and what their output is compared with."""

    dataset: Dataset
    splits: Splits
    vocabulary: vocabularies.Vocabulary


def prepare(config: Config) -> Prepared:
    """Makes or loads all that the runs have in common.

    Raises:
        ConfigError: a file is missing, or the settings do not fit each other.
    """
    dataset = DATASETS[config.dataset]
    with processes.first_goes_first():
        splits = dataset.load(config.data_dir, download=config.download)
    model = _sizes(config)
    vocabulary = _vocabulary(config, model, splits)
    _check_fit(config, model, vocabulary)
    if config.checkpoint is None:
        model = dataclasses.replace(model, vocab_size=vocabulary.size)
        graphdef, params = create(model, config.seed)
    else:
        graphdef, _ = abstract(lambda: create(model, config.seed))
        params = hugging_face.load(config.checkpoint, model)
    make = functools.partial(
        batches.encoder_decoder
        if isinstance(model, T5Config)
        else batches.decoder_only,
        vocabulary=vocabulary,
        prefix=dataset.prefix,
        source_length=config.source_length,
        target_length=config.target_length,
    )
    held_out = batches.spread(splits["validation"], config.eval_examples)
    fingerprint = _fingerprint(vocabulary, splits["train"], held_out)
    processes.check_same("the data", fingerprint)
    return Prepared(
        dataset=dataset,
        splits=splits,
        vocabulary=vocabulary,
        model=model,
        graphdef=graphdef,
        params=jax.device_get(params),
        train=make(splits["train"]),
        validation=make(held_out),
        tokens=config.source_length + config.target_length,
        fingerprint=fingerprint,
    )


def _fingerprint(vocabulary: vocabularies.Vocabulary, *parts: Sequence[Pair]) -> str:
    digest = hashlib.sha256(vocabulary.fingerprint.encode())
    for pairs in parts:
        digest.update(json.dumps(pairs).encode())
    return digest.hexdigest()[:12]


def _sizes(config: Config) -> GPT2Config | T5Config:
    if config.checkpoint is None:
        model = (PUBLISHED | _TINY)[config.model]
    else:
        model = hugging_face.read_config(config.checkpoint)
    return dataclasses.replace(
        model,
        dropout=config.dropout,
        dtype=config.dtype,
        remat=config.remat,
        scan=config.scan,
    )


def _vocabulary(
    config: Config, model: GPT2Config | T5Config, splits: Splits
) -> vocabularies.Vocabulary:
    file = config.tokenizer
    if file is None and config.checkpoint is not None:
        file = _tokenizer_of(config.checkpoint, model)
    is_t5 = isinstance(model, T5Config)
    if file is not None:
        load = vocabularies.load_sentencepiece if is_t5 else vocabularies.load_byte_pair
        return load(file)
    train = vocabularies.sentencepiece if is_t5 else vocabularies.byte_pair
    texts = [text for pair in splits["train"] for text in pair]
    return train(texts, config.vocab_size)


def _tokenizer_of(
    checkpoint: pathlib.Path, model: GPT2Config | T5Config
) -> pathlib.Path:
    if isinstance(model, GPT2Config):
        return checkpoint  # in one of two forms
    file = checkpoint / "spiece.model"
    if not file.exists():
        raise ConfigError(
            f"`--checkpoint` {checkpoint} has no spiece.model; fetch it from where the "
            "checkpoint came from, or give --tokenizer"
        )
    return file


def _check_fit(
    config: Config, model: GPT2Config | T5Config, vocabulary: vocabularies.Vocabulary
) -> None:
    if config.checkpoint is not None and vocabulary.size > model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {vocabulary.size} tokens and `--checkpoint` "
            f"{config.checkpoint} only {model.vocab_size}; give the one that belongs "
            "to it as --tokenizer"
        )
    length = config.source_length + config.target_length
    if isinstance(model, GPT2Config) and length > model.context:
        raise ConfigError(
            f"`--source-length` and `--target-length` together must be at most "
            f"{model.context}, the model's context, got {length}"
        )
