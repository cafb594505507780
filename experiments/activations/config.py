"""Which models and gradients are compiled. Nothing here imports jax."""

import dataclasses
import pathlib
from typing import Literal

from experiments.common import config
from experiments.common.chips import CHIPS
from experiments.models.config import PUBLISHED, DecoderConfig, check_context

_DECODERS = tuple(k for k, v in PUBLISHED.items() if isinstance(v, DecoderConfig))


@dataclasses.dataclass(frozen=True)
class Config:
    """Every combination is compiled; nothing is executed."""

    chips: tuple[Literal[tuple(CHIPS)], ...] = ("v5e",)
    """What is compiled for."""
    models: tuple[Literal[_DECODERS], ...] = ("gpt2", "smollm2-135m")
    """Published sizes: a GPT-2, and a Llama of about as many parameters."""
    layers: tuple[Literal["scanned", "recomputed", "unrolled"], ...] = (
        "scanned",
        "recomputed",
        "unrolled",
    )
    """A loop over stacked layers; one whose backward pass recomputes the activations of
    each layer; or no loop."""
    gradients: tuple[Literal["full", "sketched"], ...] = ("full", "sketched")
    """`jax.value_and_grad`, or `fj.sketched_value_and_grad`."""
    precisions: tuple[Literal["default", "highest"], ...] = ("default",)
    """Of products. A TPU's default rounds their operands to bfloat16, and keeps
    activations as that."""
    rank: float = 0.125
    """Rows of a sketch, as a fraction of the side of the matrix that is sketched."""
    batch_size: int = 8
    """Examples."""
    length: int = 1024
    """Tokens of each."""
    output_dir: pathlib.Path = pathlib.Path("runs/activations")
    """Where gradients.jsonl, table and picture go; what stands there is not compiled
    again."""

    def validate(self) -> None:
        """Refuses settings that make no sense.

        Raises:
            ConfigError: naming the argument, its value, and what to give instead.
        """
        config.check_choices(self)
        config.check_at_least(self, ("batch_size", "length"))
        config.check(self, ("rank",), "above 0 and below 1", lambda x: 0 < x < 1)
        config.check_some(self)
        check_context(self.models, "`--length`", self.length)
