"""Which optimizers are compiled, and which executed. Nothing here imports jax."""

import dataclasses
import pathlib
from typing import Literal

from experiments.common import config
from experiments.common.chips import CHIPS
from experiments.common.methods import METHODS

_METHODS = (
    "adamw",
    "adamw_int8",
    "adafactor",
    "adafactor_momentum",
    "muon",
    "flora",
    "flora_paper",
    "flora_fresh",
    "flora_residual",
    "flora_gaussian",
    "flora_rademacher",
    "flora_orthogonal",
    "flora_srht",
    "flora_adamw",
    "flora_adamw_int8",
    "flora_muon",
    "flora_muon_bfloat16",
    "flora_muon_rows",
    "sketched_muon",
    "apollo",
    "apollo_mini",
    "dct_adamw",
    "galore",
    "fira",
    "full_accumulation",
    "flora_accumulation",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Every combination is compiled; nothing is executed."""

    chips: tuple[Literal[tuple(CHIPS)], ...] = ("v5e",)
    """What is compiled for."""
    problems: tuple[Literal["leaf", "gpt2", "gpt2-xl"], ...] = ("leaf",)
    """One matrix of 4096 x 11008, as of Llama-2-7B; GPT-2 small; its largest size, each
    of its 48 layers with leaves of its own."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)
    """Of parameters and gradients."""
    methods: tuple[Literal[tuple(METHODS)], ...] = _METHODS
    """The optimizers; accumulations over 16 micro-steps."""
    calls: tuple[Literal["one", "two"], ...] = ("one",)
    """`fj.update_and_apply`, or `tx.update` and `optax.apply_updates`."""
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
        config.check_some(self)


@dataclasses.dataclass(frozen=True)
class Timed:
    """Steps on one matrix of 4096 x 11008, executed on the attached device."""

    chip: Literal[tuple(CHIPS)] = "h100"
    """Whose compiler's estimates what is measured is compared with."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Of parameters and gradients."""
    methods: tuple[Literal[_METHODS], ...] = _METHODS
    """The optimizers; accumulations over 16 micro-steps, whose end is not timed."""
    rank: int = 256
    """Of the sketches."""
    rounds: int = 20
    """Timed steps of each optimizer, after two that are not timed."""
    output_dir: pathlib.Path = pathlib.Path("runs/accelerators")
    """Where timed.jsonl and its table go; what stands there is not executed again."""

    def validate(self) -> None:
        """Refuses settings that make no sense.

        Raises:
            ConfigError: naming the argument, its value, and what to give instead.
        """
        config.check_at_least(self, ("rank",))
        config.check_at_least(self, ("rounds",), least=2)  # For quartiles.
        config.check_some(self)
