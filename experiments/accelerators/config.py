"""Which chips, parameters and optimizers are compiled. Nothing here imports jax."""

import dataclasses
import pathlib
from typing import Any, Literal

from experiments.common import config
from experiments.common.chips import CHIPS

# By name: title in tables, name in METHODS, and options. A randomized SVD, because an
# exact one had not compiled for a TPU after five minutes.
_RANDOMIZED = {"projection": {"TopSVD": {"method": "randomized"}}}
OPTIMIZERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "adamw": ("AdamW", "adamw", {}),
    "adamw_int8": ("AdamW, int8", "adamw", {"state_dtype": "int8"}),
    "adafactor_momentum": ("Adafactor + momentum", "adafactor_momentum", {}),
    "muon": ("Muon", "muon", {}),
    "flora": ("FLORA", "flora", {}),
    "flora_gaussian": ("FLORA, Gaussian", "flora", {"projection": "Gaussian"}),
    "flora_rademacher": ("FLORA, Rademacher", "flora", {"projection": "Rademacher"}),
    "flora_adamw": ("AdamW on sketches", "flora_adamw", {}),
    "flora_adamw_int8": ("AdamW on sketches, int8", "flora_adamw_int8", {}),
    "flora_muon": ("FLORA-Muon", "flora_muon", {}),
    "apollo": ("APOLLO", "apollo", {}),
    "apollo_mini": ("APOLLO-Mini", "apollo_mini", {}),
    "dct_adamw": ("DCT-AdamW", "dct_adamw", {}),
    "galore": ("GaLore, randomized SVD", "galore", _RANDOMIZED),
    "fira": ("Fira, randomized SVD", "fira", _RANDOMIZED),
    "full_accumulation": ("Accumulation", "full_accumulation", {}),
    "flora_accumulation": ("FLORA accumulation", "flora_accumulation", {}),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Every combination is compiled; nothing is executed."""

    chips: tuple[Literal[tuple(CHIPS)], ...] = ("v5e",)
    """What is compiled for."""
    problems: tuple[Literal["leaf", "gpt2"], ...] = ("leaf",)
    """One matrix of 4096 x 11008, as of Llama-2-7B, or GPT-2 small."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)
    """Of parameters and gradients."""
    optimizers: tuple[Literal[tuple(OPTIMIZERS)], ...] = tuple(OPTIMIZERS)
    """The optimizers; accumulations over 16 micro-steps."""
    rank: int = 256
    """Of the sketches."""
    output_dir: pathlib.Path = pathlib.Path("runs/accelerators")
    """Where steps.jsonl, table and picture go; what stands there is not compiled
    again."""

    def validate(self) -> None:
        """Refuses settings that make no sense.

        Raises:
            ConfigError: naming the argument, its value, and what to give instead.
        """
        config.check_at_least(self, ("rank",))
        config.check_some(self, ("chips", "problems", "dtypes", "optimizers"))
