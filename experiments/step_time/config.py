"""Settings of the benchmark. Nothing here imports jax."""

import dataclasses
import pathlib
from typing import Literal

from experiments.common.errors import ConfigError

Tree = Literal["gpt2", "gpt2-stacked", "gpt2-xl", "gpt2-xl-stacked"]

Which = Literal["flora", "family"]


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
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
    output_dir: pathlib.Path = pathlib.Path("runs/benchmark")
    """Where benchmark.json, benchmark.md and benchmark.png go."""

    def validate(self) -> None:
        """Refuse settings that make no sense.

        Raises:
            ConfigError: naming the argument, its value, and what to give instead.
        """
        if self.rounds < 2:
            raise ConfigError(
                f"`--rounds` must be at least 2, for a median and quartiles, got "
                f"{self.rounds}"
            )
        for name in ("ranks", "other_ranks"):
            if any(rank < 1 for rank in getattr(self, name)):
                flag = "--" + name.replace("_", "-")
                raise ConfigError(
                    f"`{flag}` must be at least 1, got {getattr(self, name)}"
                )
