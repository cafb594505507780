"""From the settings to a model, a vocabulary and the pairs to train on."""

import dataclasses
import pathlib
from typing import Any, NamedTuple

from flax import nnx

from experiments.config import ConfigError
from experiments.datasets import vocabulary as vocabularies
from experiments.datasets.pairs import Splits
from experiments.datasets.registry import DATASETS, Dataset
from experiments.finetune.config import Config
from experiments.models import (
    PUBLISHED,
    GPT2Config,
    T5Config,
    create,
    hugging_face,
)

_TINY = {"t5-tiny": T5Config(), "gpt2-tiny": GPT2Config(2, 128, 4, 256)}


class Prepared(NamedTuple):
    """What all methods start from."""

    dataset: Dataset
    splits: Splits
    vocabulary: vocabularies.Vocabulary
    model: GPT2Config | T5Config
    graphdef: nnx.GraphDef
    params: dict[str, Any]


def prepare(config: Config) -> Prepared:
    """Makes or loads all that the trainings have in common.

    Raises:
        ConfigError: a file is missing, or the settings do not fit each other.
    """
    dataset = DATASETS[config.dataset]
    splits = dataset.load(config.data_dir, download=config.download)
    model = _sizes(config)
    vocabulary = _vocabulary(config, model, splits)
    _check_fit(config, model, vocabulary)
    if config.checkpoint is None:
        model = dataclasses.replace(model, vocab_size=vocabulary.size)
    graphdef, params = create(model, config.seed)
    if config.checkpoint is not None:
        params = hugging_face.load(config.checkpoint, model)
    return Prepared(dataset, splits, vocabulary, model, graphdef, params)


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
    name = "spiece.model" if isinstance(model, T5Config) else "tokenizer.json"
    file = checkpoint / name
    if not file.exists():
        raise ConfigError(
            f"`--checkpoint` {checkpoint} has no {name}; fetch it from where the "
            "checkpoint came from, or give --tokenizer"
        )
    return file


def _check_fit(
    config: Config, model: GPT2Config | T5Config, vocabulary: vocabularies.Vocabulary
) -> None:
    if config.checkpoint is not None and vocabulary.size > model.vocab_size:
        raise ConfigError(
            f"`--tokenizer` has {vocabulary.size} tokens and the checkpoint only "
            f"{model.vocab_size}; give the tokenizer that belongs to it"
        )
    length = config.source_length + config.target_length
    if isinstance(model, GPT2Config) and length > model.context:
        raise ConfigError(
            f"`--source-length` and `--target-length` together must be at most "
            f"{model.context}, the model's context, got {length}"
        )
