"""Named recipes: a paper's optimizer as a chain of parts."""

from flora_jax.optimizers.apollo import apollo, apollo_mini
from flora_jax.optimizers.dct_adamw import dct_adamw
from flora_jax.optimizers.fira import fira
from flora_jax.optimizers.flora import adafactor, flora
from flora_jax.optimizers.flora_adamw import flora_adamw
from flora_jax.optimizers.flora_muon import flora_muon
from flora_jax.optimizers.galore import galore

__all__ = [
    "adafactor",
    "apollo",
    "apollo_mini",
    "dct_adamw",
    "fira",
    "flora",
    "flora_adamw",
    "flora_muon",
    "galore",
]
