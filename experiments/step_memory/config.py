"""Which models and methods are measured, and which settings make no sense.

Nothing here imports jax: `--help` and a refused command line answer at once.
"""

import dataclasses
import pathlib
from typing import Literal

from experiments.common.config import check_at_least, check_choices
from experiments.common.errors import ConfigError
from experiments.common.methods import METHODS
from experiments.models.config import PUBLISHED, GPT2Config

ModelName = Literal[tuple(PUBLISHED)]
MethodName = Literal[
    tuple(name for name, method in METHODS.items() if method.kind == "accumulation")
]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured; nothing of it is allocated."""

    models: tuple[ModelName, ...] = ("t5-3b", "gpt2-xl")
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
    projection: Literal[
        "CountSketch", "Gaussian", "Rademacher", "Orthogonal", "SRHT"
    ] = "CountSketch"
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
        check_choices(self)
        check_at_least(self, "ranks batch_size source_length target_length")
        for name in ("models", "methods", "ranks"):
            if not getattr(self, name):
                raise ConfigError(f"`--{name}` must name at least one, got none")
        length = self.source_length + self.target_length
        for name in self.models:
            size = PUBLISHED[name]
            if isinstance(size, GPT2Config) and length > size.context:
                raise ConfigError(
                    f"`--source-length` and `--target-length` together must be at most "
                    f"{size.context}, the context of {name}, got {length}"
                )
