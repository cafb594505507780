"""From the settings to a model, a vocabulary and the pairs to train on."""

import dataclasses
import functools
import hashlib
import json
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
from experiments.models import hugging_face, pretrained
from experiments.models.build import create
from experiments.models.config import PUBLISHED, DecoderConfig, GPT2Config, T5Config
from experiments.models.config import Config as ModelConfig

_TINY = {"t5-tiny": T5Config(), "gpt2-tiny": GPT2Config(2, 128, 4, 256)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared(Data):
    """What all methods start from, and what their output is compared with."""

    dataset: Dataset
    splits: Splits
    vocabulary: vocabularies.Vocabulary
    layout: batches.Layout
    eval_datasets: dict[str, list[batches.Example]]


def prepare(config: Config) -> Prepared:
    """Makes or loads all that the runs have in common.

    Raises:
        ConfigError: a file is missing, or the settings do not fit each other.
    """
    dataset = DATASETS[config.dataset]
    with processes.first_goes_first():
        splits = dataset.load(config.data_dir, download=config.download)
        if config.checkpoint is None and config.model in pretrained.PACKAGES:
            folder = pretrained.unpack(config.model, config.data_dir)
            config = dataclasses.replace(config, checkpoint=folder)
    model = _sizes(config)
    vocabulary = _vocabulary(config, model, splits)
    _check_fit(config, model, vocabulary.size)
    if config.checkpoint is None:
        model = dataclasses.replace(model, vocab_size=vocabulary.size)
        graphdef, params = create(model, config.seed)
    else:
        graphdef, _ = jax.eval_shape(lambda: create(model, config.seed))
        params = hugging_face.load(config.checkpoint, model)
    lengths = (config.source_length, config.target_length)
    layout = batches.Layout(vocabulary, dataset.prefix, *lengths)
    make = functools.partial(_examples, layout, model)
    held_out = batches.spread(splits["validation"], config.eval_examples)
    others = {name: _held_out(config, name) for name in config.eval_datasets}
    digest = hashlib.sha256(vocabulary.fingerprint.encode())
    for pairs in (splits["train"], held_out, *others.values()):
        digest.update(json.dumps(pairs).encode())
    fingerprint = digest.hexdigest()[:12]
    processes.check_same("the data", fingerprint)
    return Prepared(
        dataset=dataset,
        splits=splits,
        vocabulary=vocabulary,
        layout=layout,
        eval_datasets={name: make(name, pairs) for name, pairs in others.items()},
        model=model,
        graphdef=graphdef,
        params=jax.device_get(params),
        train=make(config.dataset, splits["train"]),
        validation=make(config.dataset, held_out),
        tokens=sum(lengths),
        fingerprint=fingerprint,
        pretrained=config.checkpoint is not None,
    )


def _examples(
    layout: batches.Layout, model: ModelConfig, name: str, pairs: Sequence[Pair]
) -> list[batches.Example]:
    """A data set's pairs as the model reads them."""
    layout = dataclasses.replace(layout, prefix=DATASETS[name].prefix)
    if not isinstance(model, T5Config):
        return layout.decoder_only(pairs)
    if layout.prefix is None:
        raise ConfigError(
            f"a T5 has no plain texts to continue, got {name!r}; choose a data set of "
            "pairs, or another --model"
        )
    return layout.encoder_decoder(pairs)


def _held_out(config: Config, name: str) -> list[Pair]:
    """The validation of another data set."""
    splits = DATASETS[name].load(config.data_dir, download=config.download)
    return batches.spread(splits["validation"], config.eval_examples)


def _sizes(config: Config) -> ModelConfig:
    model = (PUBLISHED | _TINY)[config.model]
    if config.checkpoint is not None:
        model = hugging_face.read_config(config.checkpoint)
    names = ("dropout", "dtype", "remat", "scan")
    return dataclasses.replace(model, **{name: getattr(config, name) for name in names})


def _vocabulary(
    config: Config, model: ModelConfig, splits: Splits
) -> vocabularies.Vocabulary:
    file, is_t5 = config.tokenizer, isinstance(model, T5Config)
    if file is None and config.checkpoint is not None:
        # That of a GPT-2 is in the folder in one of two forms.
        file = config.checkpoint / "spiece.model" if is_t5 else config.checkpoint
        if not file.exists():
            raise ConfigError(
                f"`--checkpoint` {config.checkpoint} has no spiece.model; fetch it "
                "from where the checkpoint came from, or give --tokenizer"
            )
    if file is not None:
        load = vocabularies.load_sentencepiece if is_t5 else vocabularies.load_byte_pair
        return load(file)
    train = vocabularies.sentencepiece if is_t5 else vocabularies.byte_pair
    texts = [text for pair in splits["train"] for text in pair]
    return train(texts, config.vocab_size)


def _check_fit(config: Config, model: ModelConfig, size: int) -> None:
    if config.checkpoint is not None and size > model.vocab_size:
        raise ConfigError(
            f"the tokenizer has {size} tokens and `--checkpoint` "
            f"{config.checkpoint} only {model.vocab_size}; give the one that belongs "
            "to it as --tokenizer"
        )
    length = config.source_length + config.target_length
    if isinstance(model, DecoderConfig) and length > model.context:
        raise ConfigError(
            f"`--source-length` and `--target-length` together must be at most "
            f"{model.context}, the model's context, got {length}"
        )
