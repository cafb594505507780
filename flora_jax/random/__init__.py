"""Random bits that never change, and the keys they are made from."""

from flora_jax.random.bits import bits, fold, hashes, normals, signs
from flora_jax.random.keys import check_state_key, leaf_keys, raw_key, renewal

__all__ = [
    "bits",
    "check_state_key",
    "fold",
    "hashes",
    "leaf_keys",
    "normals",
    "raw_key",
    "renewal",
    "signs",
]
