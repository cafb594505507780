"""What is measured of a micro-step, and which settings make no sense.

Nothing here imports jax: `--help` and a refused command line answer at once.
"""

import dataclasses
import pathlib
from typing import Literal

from experiments.common.config import check_at_least, check_choices
from experiments.common.errors import ConfigError, flag
from experiments.models.config import PUBLISHED, GPT2Config

ModelName = Literal[tuple(PUBLISHED)]
Projection = Literal["CountSketch", "Gaussian", "Rademacher", "Orthogonal", "SRHT"]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    models: tuple[ModelName, ...] = ("gpt2", "t5-small")
    """Published sizes of the blocks."""
    blocks: int = 1
    """Blocks of a GPT-2; encoder blocks and decoder blocks of a T5."""
    batch_size: int = 2
    """Examples in a micro-batch."""
    length: int = 480
    """Tokens of an example; for a T5 of its source and of its target."""
    ranks: tuple[int, ...] = (16, 64, 256)
    """Ranks of the sketches."""
    projections: tuple[Projection, ...] = ("CountSketch", "Gaussian")
    """How matrices are sketched."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters and sketches are float32."""
    rounds: int = 7
    """Timed micro-steps of each contender, after two that are not timed."""
    output_dir: pathlib.Path = pathlib.Path("runs/micro_step")
    """Where micro_step.json, table and picture go."""

    def validate(self) -> None:
        """Refuses settings that make no sense.

        Raises:
            ConfigError: naming the argument, its value, and what to give instead.
        """
        check_choices(self)
        check_at_least(self, "ranks blocks batch_size length")
        check_at_least(self, "rounds", least=2)  # For a median and quartiles.
        for name in ("models", "ranks", "projections"):
            if not getattr(self, name):
                raise ConfigError(f"`{flag(name)}` must name at least one, got none")
        for name in self.models:
            size = PUBLISHED[name]
            if isinstance(size, GPT2Config) and self.length > size.context:
                raise ConfigError(
                    f"`--length` must be at most {size.context}, the context of {name},"
                    f" got {self.length}"
                )
