"""Sets of defaults by name: two that run anywhere, and the paper's."""

import dataclasses
import pathlib

from experiments.finetune.config import Config

_DOCSTRINGS = Config()
_PHRASES = Config(dataset="phrases", source_length=32)
# The paper's: accumulation of 16, Adafactor's defaults, rates and ranks by size. Its
# batch sizes and numbers of updates are not known here: those below are a choice.
_T5_SMALL = Config(
    dataset="xsum",
    model="t5-small",
    vocab_size=32_000,
    learning_rate=1e-3,
    lora_learning_rate=3e-3,
    schedule="constant",
    warmup_fraction=0.0,
    ranks=(8, 32, 128, 256),
    methods=("none", "full_accumulation", "flora_accumulation", "lora_accumulation"),
    source_length=512,
    target_length=128,
    dropout=0.1,
    updates=10_000,
    batch_size=64,
    projection="Gaussian",
    eval_every=500,
    checkpoint_every=500,
    eval_examples=2000,
    decode_examples=20_000,
)
_T5_3B = dataclasses.replace(
    _T5_SMALL,
    model="t5-3b",
    checkpoint=pathlib.Path("t5-3b"),
    lora_tune_rest=False,
    learning_rate=4e-4,
    lora_learning_rate=1e-3,
    ranks=(16, 64, 256, 512),
    remat=True,
    scan=True,
)
_GPT2 = dataclasses.replace(
    _T5_SMALL,
    dataset="iwslt2017",
    model="gpt2",
    vocab_size=50_257,
    source_length=128,
    target_length=128,
)
_GPT2_XL = dataclasses.replace(
    _T5_3B,
    dataset="iwslt2017",
    model="gpt2-xl",
    checkpoint=pathlib.Path("gpt2-xl"),
    source_length=128,
    target_length=128,
)

PRESETS = {
    "docstrings": ("docstring body to summary line, offline, two cores", _DOCSTRINGS),
    "phrases": ("German to English CLDR phrases, offline, two cores", _PHRASES),
    "xsum-t5-small": ("the paper's summarization from scratch", _T5_SMALL),
    "xsum-t5-3b": ("the paper's summarization, of ./t5-3b", _T5_3B),
    "iwslt-gpt2": ("the paper's translation from scratch", _GPT2),
    "iwslt-gpt2-xl": ("the paper's translation, of ./gpt2-xl", _GPT2_XL),
}
