"""Named recipes: a paper's optimizer as a chain of parts."""

from flora_jax.optimizers.adamw import (
    apollo,
    apollo_mini,
    dct_adamw,
    fira,
    flora_adamw,
    galore,
)
from flora_jax.optimizers.flora import flora
from flora_jax.optimizers.flora_muon import flora_muon

__all__ = [
    "apollo",
    "apollo_mini",
    "dct_adamw",
    "fira",
    "flora",
    "flora_adamw",
    "flora_muon",
    "galore",
]
