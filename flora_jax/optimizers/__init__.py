"""Named recipes: a paper's optimizer as a chain of parts."""

from flora_jax.optimizers._apollo import apollo, apollo_mini
from flora_jax.optimizers._dct_adamw import dct_adamw
from flora_jax.optimizers._fira import fira
from flora_jax.optimizers._flora import flora
from flora_jax.optimizers._flora_adamw import flora_adamw
from flora_jax.optimizers._galore import galore

__all__ = [
    "apollo",
    "apollo_mini",
    "dct_adamw",
    "fira",
    "flora",
    "flora_adamw",
    "galore",
]
