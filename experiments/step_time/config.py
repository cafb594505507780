"""What is timed. Nothing here imports jax: `--help` answers at once."""

import dataclasses
import pathlib
from typing import Literal

from experiments.common.config import check_at_least

Tree = Literal["gpt2", "gpt2-stacked", "gpt2-xl", "gpt2-xl-stacked"]
Which = Literal["flora", "family"]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured."""

    contenders: Which = "flora"
    """Which of ours: FLORA with each projection and what it accumulates, or the whole
    family of optimizers, each without and with a new basis."""
    trees: tuple[Tree, ...] = ("gpt2", "gpt2-stacked")
    """Parameter trees: gpt2 (124M), gpt2-stacked (its layers in one array per weight),
    gpt2-xl (1.5B), and their -stacked forms."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Types of parameters and gradients."""
    ranks: tuple[int, ...] = (16, 64, 256)
    """Ranks on the first tree and type."""
    other_ranks: tuple[int, ...] = (64,)
    """Ranks on the other trees and types."""
    compile_tree: Tree | None = "gpt2-xl"
    """Tree of 48 layers whose compile times are compared; nothing is allocated."""
    rounds: int = 7
    """Timed steps of each optimizer, after two that are not timed."""
    output_dir: pathlib.Path = pathlib.Path("runs/step_time")
    """Where flora.json or family.json, the table and the picture go."""

    def validate(self) -> None:
        """Refuses settings that make no sense.

        Raises:
            ConfigError: naming the argument, its value, and what to give instead.
        """
        check_at_least(self, ("rounds",), least=2)  # For a median and quartiles.
        check_at_least(self, ("ranks", "other_ranks"))
