"""Which models and methods are compiled, and which settings make no sense.

Nothing here imports jax: `--help` and a refused command line answer at once.
"""

import dataclasses
import pathlib
from typing import Literal

from experiments.common import config
from experiments.common.chips import CHIPS
from experiments.common.methods import METHODS
from experiments.models.config import PublishedName, check_context


@dataclasses.dataclass(frozen=True)
class Config:
    """Every combination is compiled; nothing is executed."""

    chips: tuple[Literal[tuple(CHIPS)], ...] = ("v5e",)
    """What is compiled for."""
    models: tuple[PublishedName, ...] = ("t5-3b", "gpt2-xl")
    """Published sizes."""
    methods: tuple[Literal[tuple(METHODS)], ...] = (
        "adam",
        "full_accumulation",
        "lora_accumulation",
        "galore",
        "flora_accumulation",
        "sketched_accumulation",
    )
    """The optimizers; accumulations over 16 micro-steps. Those that sketch accumulators
    have the Adafactor of flora_jax inside."""
    ranks: tuple[int, ...] = (16, 64)
    """Ranks of sketches and adapters."""
    embeddings: bool = False
    """Whether sketches are taken of embeddings as well, by a larger aspect ratio."""
    projection: config.Projection = "CountSketch"
    """How accumulated gradients are sketched; the state is the same for all."""
    batch_size: int = 1
    """Examples in one micro-batch."""
    source_length: int = 512
    """Tokens of T5's input; the first part of a decoder's."""
    target_length: int = 64
    """Tokens of the output."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of parameters, computation, adapters and Adam's moments; full accumulators
    and GaLore's moments are float32."""
    accumulator_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of accumulators that are sketches."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """Of updated parameters, which matters for bfloat16."""
    remat: bool = True
    """Recompute the activations of each block in the backward pass."""
    scan: bool = True
    """Stack the layers and scan over them: compiles faster."""
    output_dir: pathlib.Path = pathlib.Path("runs/step_memory")
    """Where steps.jsonl, table and picture go."""

    def validate(self) -> None:
        """Refuses settings that make no sense.

        Raises:
            ConfigError: naming the argument, its value, and what to give instead.
        """
        config.check_choices(self)
        config.check_at_least(
            self, ("ranks", "batch_size", "source_length", "target_length")
        )
        config.check_some(self)
        flags = "`--source-length` and `--target-length` together"
        check_context(self.models, flags, self.source_length + self.target_length)
