"""Which models and methods are measured, and which settings make no sense.

Nothing here imports jax: `--help` and a refused command line answer at once.
"""

import dataclasses
import pathlib
from typing import Literal

from experiments.common import config
from experiments.common.methods import METHODS
from experiments.models.config import PublishedName, check_context

MethodName = Literal[tuple(x for x in METHODS if METHODS[x].kind == "accumulation")]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured; nothing of it is allocated."""

    models: tuple[PublishedName, ...] = ("t5-3b", "gpt2-xl")
    """Published sizes."""
    methods: tuple[MethodName, ...] = (
        "adam_accumulation",
        "full_accumulation",
        "lora_accumulation",
        "flora_accumulation",
        "sketched_accumulation",
    )
    """What accumulates gradients for Adafactor, or for Adam: in full, as a sketch, as a
    sketch that backpropagation makes, or of adapters alone."""
    ranks: tuple[int, ...] = (16, 64, 256, 512)
    """Ranks of sketches and adapters."""
    projection: config.Projection = "CountSketch"
    """How gradients are sketched; the state is the same for all."""
    batch_size: int = 1
    """Examples in one micro-batch."""
    source_length: int = 512
    """Tokens of T5's input; the first part of GPT-2's."""
    target_length: int = 64
    """Tokens of the output."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters, states and accumulators are float32."""
    remat: bool = True
    """Recompute the activations of each block in the backward pass."""
    scan: bool = True
    """Stack the layers and scan over them: compiles faster."""
    output_dir: pathlib.Path = pathlib.Path("runs/step_memory")
    """Where step_memory.json, table and picture go."""

    def validate(self) -> None:
        """Refuses settings that make no sense.

        Raises:
            ConfigError: naming the argument, its value, and what to give instead.
        """
        config.check_choices(self)
        config.check_at_least(
            self, ("ranks", "batch_size", "source_length", "target_length")
        )
        config.check_some(self, ("models", "methods", "ranks"))
        flags = "`--source-length` and `--target-length` together"
        check_context(self.models, flags, self.source_length + self.target_length)
