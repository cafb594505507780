"""Which model and methods are measured, and which settings make no sense."""

import dataclasses
import pathlib
from typing import Literal

from experiments.common.errors import ConfigError, check_projection, flag
from experiments.models.config import PUBLISHED, GPT2Config

MethodName = Literal["naive", "flora", "sketched", "lora", "adam"]
RANKED = ("flora", "sketched", "lora")


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured; nothing of it is allocated."""

    model: tuple[str, ...] = ("t5-3b", "gpt2-xl")
    """Published models: gpt2, gpt2-medium, gpt2-large, gpt2-xl, t5-small, t5-base,
    t5-large, t5-3b, t5-v1_1-small, t5-v1_1-base."""
    method: tuple[MethodName, ...] = ("adam", "naive", "lora", "flora", "sketched")
    """naive, flora and lora accumulate gradients for Adafactor: in full, as a sketch,
    of adapters alone; sketched is flora with gradients that are sketches from the
    start; adam accumulates in full for Adam."""
    rank: str = "16,64,256,512"
    """Ranks of sketches and adapters, separated by commas."""
    projection: str = "CountSketch"
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
    """Compute activations of each block again in the backward pass."""
    scan: bool = True
    """Stack the layers and scan over them: compiles faster."""
    output_dir: pathlib.Path = pathlib.Path("runs/memory")
    """Where memory.json, memory.md and memory.png go."""

    def validate(self) -> None:
        """Refuse settings that make no sense.

        Raises:
            ConfigError: naming the argument, its value, and what to give instead.
        """
        for name in self.model:
            if name not in PUBLISHED:
                raise ConfigError(
                    f"`--model` must be of {', '.join(PUBLISHED)}, got {name!r}"
                )
        for name in ("model", "method"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ConfigError(
                    f"`--{name}` must name at least one, each once, got "
                    f"{' '.join(values)!r}"
                )
        check_projection(self.projection)
        for name in ("batch_size", "source_length", "target_length"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"`{flag(name)}` must be at least 1, got {value}")
        self._check_context()
        self.ranks()

    def _check_context(self) -> None:
        length = self.source_length + self.target_length
        for name in self.model:
            size = PUBLISHED[name]
            if isinstance(size, GPT2Config) and length > size.context:
                raise ConfigError(
                    f"`--source-length` and `--target-length` together must be at most "
                    f"{size.context}, the context of {name}, got {length}"
                )

    def ranks(self) -> tuple[int, ...]:
        """Returns the ranks as numbers.

        Raises:
            ConfigError: one of them is no positive whole number.
        """
        ranks = []
        for word in self.rank.split(","):
            if not word.strip().isdecimal() or int(word) < 1:
                raise ConfigError(
                    f"`--rank` must be positive whole numbers separated by commas, got "
                    f"{self.rank!r}; for example 16,64,256"
                )
            ranks.append(int(word))
        return tuple(ranks)
