"""Sets of defaults by name: two that run anywhere, and the paper's."""

import dataclasses

from experiments.finetune.config import Config

_DOCSTRINGS = Config()
_PHRASES = Config(dataset="phrases", source_length=32)
# Accumulation of 16, base Adafactor with the paper's defaults, ranks 8 to 512 by size.
_T5_SMALL = Config(
    dataset="xsum",
    model="t5-small",
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
    eval_examples=1024,
    decode_examples=1024,
)
_T5_3B = dataclasses.replace(
    _T5_SMALL,
    model="t5-3b",
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
    learning_rate=1e-3,
    ranks=(8, 32, 128, 256),
    source_length=128,
    target_length=128,
)
_GPT2_XL = dataclasses.replace(
    _GPT2, model="gpt2-xl", ranks=(16, 64, 256, 512), remat=True, scan=True
)

PRESETS = {
    "docstrings": ("docstring body to summary line, offline, two cores", _DOCSTRINGS),
    "phrases": ("German to English CLDR phrases, offline, two cores", _PHRASES),
    "xsum-t5-small": ("the paper's summarisation from scratch", _T5_SMALL),
    "xsum-t5-3b": ("the paper's fine-tuning; give --checkpoint", _T5_3B),
    "iwslt-gpt2": ("the paper's translation", _GPT2),
    "iwslt-gpt2-xl": ("the same with 1.5 billion parameters", _GPT2_XL),
}
