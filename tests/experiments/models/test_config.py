"""Sizes: what is published, and what is refused."""

import dataclasses
import subprocess
import sys

import jax
import pytest

from experiments.common.errors import ConfigError
from experiments.models import build
from experiments.models.config import PUBLISHED, GPT2Config, T5Config, validate
from tests.experiments.models.tiny import CONFIGS

# Numbers of parameters as their publishers and the transformers library count them;
# the sizes in between take seconds to trace and have no code of their own.
COUNTS = {
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-3b": 2_851_598_336,
    "t5-v1_1-small": 76_961_152,
}


@pytest.mark.full
@pytest.mark.parametrize("name", COUNTS)
def test_published_parameter_counts(name):
    params = jax.eval_shape(lambda: build.create(PUBLISHED[name], 0)[1])
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == COUNTS[name]


@pytest.mark.parametrize("config", [*PUBLISHED.values(), *CONFIGS.values()])
def test_good_settings_pass(config):
    validate(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPT2Config(layers=0), r"`--model.layers` must be at least 1, got 0"),
        (GPT2Config(vocab_size=-1), r"`--model.vocab-size` must be at least 1, got -1"),
        (T5Config(head_width=0), r"`--model.head-width` must be at least 1, got 0"),
        (T5Config(dropout=1.0), r"`--model.dropout` must be in \[0, 1\), got 1.0"),
        (GPT2Config(dropout=-0.1), r"`--model.dropout` must be in .*, got -0.1"),
        (GPT2Config(dtype="float16"), r"`--model.dtype` must be .*, got 'float16'"),
        (GPT2Config(width=250), r"`--model.heads` must divide .* 4 and 250; 2 heads"),
        (T5Config(buckets=7), r"`--model.buckets` must be even .*, got 7"),
        (T5Config(buckets=2), r"`--model.buckets` must be even .*, got 2"),
        (
            T5Config(max_distance=16),
            r"`--model.max-distance` must be above half of .* \(16\), got 16",
        ),
    ],
)
def test_refused_settings(config, message):
    with pytest.raises(ConfigError, match=message):
        validate(config)
    with pytest.raises(ConfigError, match=message):
        build.create(config, 0)


def test_every_size_is_checked():
    for config in (GPT2Config(), T5Config()):
        for field in dataclasses.fields(config):
            if field.type is int:
                with pytest.raises(ConfigError, match=field.name.replace("_", "-")):
                    validate(dataclasses.replace(config, **{field.name: 0}))


def test_settings_import_no_jax():
    code = "import sys, experiments.models.config; print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
