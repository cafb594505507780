"""Settings of the benchmark. Nothing here imports jax."""

import dataclasses
import pathlib

TREES = ("gpt2", "gpt2-stacked")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """What is measured."""

    trees: tuple[str, ...] = TREES
    """Parameter trees: gpt2 (124M), gpt2-stacked (its layers in one array per weight),
    gpt2-xl (1.5B), and their -stacked forms."""
    dtypes: tuple[str, ...] = DTYPES
    """Types of parameters and gradients."""
    ranks: tuple[int, ...] = (16, 64, 256)
    """Ranks on the first tree and type."""
    other_ranks: tuple[int, ...] = (64,)
    """Ranks on the other trees and types."""
    compile_tree: str = "gpt2-xl"
    """Tree of 48 layers whose compile times are compared; nothing is allocated."""
    rounds: int = 7
    """Timed steps of each optimizer, after two that are not timed."""
    output_dir: pathlib.Path = pathlib.Path("runs/benchmark")
    """Where benchmark.json and benchmark.png go."""
