"""What is measured of a micro-step, and which settings make no sense.

Nothing here imports jax: `--help` and a refused command line answer at once.
"""

import dataclasses
import pathlib
from typing import Literal

from experiments.common import config
from experiments.models.config import PublishedName, check_context


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    models: tuple[PublishedName, ...] = ("gpt2", "t5-small")
    """Published sizes of the blocks."""
    blocks: int = 1
    """Blocks of a GPT-2; encoder blocks and decoder blocks of a T5."""
    batch_size: int = 2
    """Examples in a micro-batch."""
    length: int = 480
    """Tokens of an example; for a T5 of its source and of its target."""
    ranks: tuple[int, ...] = (16, 64, 256)
    """Ranks of the sketches."""
    projections: tuple[config.Projection, ...] = ("CountSketch", "Gaussian")
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
        config.check_choices(self)
        config.check_at_least(self, ("ranks", "blocks", "batch_size", "length"))
        config.check_at_least(self, ("rounds",), least=2)  # For a median and quartiles.
        config.check_some(self)
        check_context(self.models, "`--length`", self.length)
