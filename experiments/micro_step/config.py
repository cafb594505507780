"""What is measured of a micro-step, and which settings make no sense.

Nothing here imports jax: `--help` and a refused command line answer at once.
"""

import dataclasses
import pathlib
from typing import Literal

from experiments.common.errors import PROJECTIONS, ConfigError, flag
from experiments.models.config import PUBLISHED, GPT2Config


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    model: tuple[str, ...] = ("gpt2", "t5-small")
    """Published sizes of the blocks; see `python -m experiments.step_memory --help`."""
    blocks: int = 1
    """Blocks of a GPT-2; encoder blocks and decoder blocks of a T5."""
    batch_size: int = 2
    """Examples in a micro-batch."""
    length: int = 480
    """Tokens of an example; for a T5 of its source and of its target."""
    ranks: tuple[int, ...] = (16, 64, 256)
    """Ranks of the sketches."""
    projections: tuple[str, ...] = ("CountSketch", "Gaussian")
    """How matrices are sketched."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters and sketches are float32."""
    rounds: int = 7
    """Timed micro-steps of each contender, after two that are not timed."""
    output_dir: pathlib.Path = pathlib.Path("runs/micro_step")
    """Where micro_step.json, micro_step.md and micro_step.png go."""

    def validate(self) -> None:
        """Refuse settings that make no sense.

        Raises:
            ConfigError: naming the argument, its value, and what to give instead.
        """
        for name in ("model", "ranks", "projections"):
            if not getattr(self, name):
                raise ConfigError(f"`{flag(name)}` must name at least one, got none")
        choices = {"model": tuple(PUBLISHED), "projections": PROJECTIONS}
        for name, known in choices.items():
            for value in getattr(self, name):
                if value not in known:
                    raise ConfigError(
                        f"`{flag(name)}` must be of {', '.join(known)}, got {value!r}"
                    )
        for name in ("blocks", "batch_size", "length", "rounds", "ranks"):
            values = getattr(self, name)
            if any(x < 1 for x in (values if name == "ranks" else (values,))):
                raise ConfigError(f"`{flag(name)}` must be at least 1, got {values}")
        for name in self.model:
            size = PUBLISHED[name]
            if isinstance(size, GPT2Config) and self.length > size.context:
                raise ConfigError(
                    f"`--length` must be at most {size.context}, the context of {name},"
                    f" got {self.length}"
                )
        if self.rounds < 2:
            raise ConfigError("`--rounds` must be at least 2, for a median, got 1")
