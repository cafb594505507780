"""What a fine-tuning is made of, and which settings make no sense.

Nothing here imports jax: `--help` and a refused command line answer at once.
"""

import dataclasses
import pathlib
from typing import Literal

from experiments.common.config import (
    JobConfig,
    MethodName,
    check_at_least,
    check_fractions,
)
from experiments.models.config import PUBLISHED

ModelName = Literal["t5-tiny", "gpt2-tiny", *PUBLISHED]
DatasetName = Literal["docstrings", "phrases", "xsum", "billsum", "iwslt2017", "opus"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(JobConfig):
    """All settings; the defaults are the offline summarization."""

    dataset: DatasetName = "docstrings"
    """docstrings and phrases are made on the spot, at the scale of a smoke test;
    billsum and opus are downloaded with --download; xsum and iwslt2017 are fetched by
    hand (the message says how)."""
    model: ModelName = "t5-tiny"
    """A published size, or a tiny one for two cores; from scratch, unless there is a
    --checkpoint."""
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

    methods: tuple[MethodName, ...] = (
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
        check_at_least(self, "source_length target_length", least=2)
        check_at_least(self, "decode_examples beams")
        check_at_least(self, "samples", least=0)
        check_fractions(self, "dropout")
