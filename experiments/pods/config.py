"""Which pods, models and optimizers are compiled. Nothing here imports jax."""

import dataclasses
import pathlib
from typing import Literal

from experiments.common import config
from experiments.common.methods import METHODS


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder of Llama's architecture, whose layers are stacked.

    Attributes:
        layers: number of blocks.
        width: of the residual stream.
        mlp: width of the gated feed-forward layer.
        queries: width of all query heads together.
        keys: width of all key heads together, and of the value heads.
        vocabulary: number of tokens; input and output embeddings are not tied.
    """

    layers: int
    width: int
    mlp: int
    queries: int
    keys: int
    vocabulary: int


# As published.
MODELS = {
    "llama-2-7b": Model(32, 4096, 11008, 4096, 4096, 32000),
    "llama-3-70b": Model(80, 8192, 28672, 8192, 1024, 128256),
}
# Chips along (fsdp, tensor).
LAYOUTS = {
    "v5e:8x8": {"fsdp": (64, 1), "fsdp x tensor": (8, 8)},
    "v5e:16x16": {"fsdp": (256, 1), "fsdp x tensor": (16, 16)},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Every combination is compiled; nothing is executed."""

    models: tuple[Literal[tuple(MODELS)], ...] = tuple(MODELS)
    """Published sizes."""
    pods: tuple[Literal[tuple(LAYOUTS)], ...] = tuple(LAYOUTS)
    """Chips, as the compiler names them."""
    layouts: tuple[Literal["fsdp", "fsdp x tensor"], ...] = ("fsdp", "fsdp x tensor")
    """Fully sharded over all chips, or tensor parallel along one side of the pod."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)
    """Of parameters and gradients."""
    methods: tuple[Literal[tuple(METHODS)], ...] = (
        "adamw",
        "flora",
        "flora_adamw",
        "flora_adamw_int8",
        "flora_muon",
        "muon",
        "galore",
    )
    """Optimizers."""
    rank: int = 256
    """Of the sketches."""
    output_dir: pathlib.Path = pathlib.Path("runs/pods")
    """Where pods.jsonl and its table go; what stands there is not compiled again."""

    def validate(self) -> None:
        """Refuses settings that make no sense.

        Raises:
            ConfigError: naming the argument, its value, and what to give instead.
        """
        config.check_at_least(self, ("rank",))
        config.check_some(self)
