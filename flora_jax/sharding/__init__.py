"""Many devices: where state lies, and what they send one another."""

from flora_jax.sharding.compressed_pmean import compressed_pmean
from flora_jax.sharding.state_sharding import state_sharding

__all__ = ["compressed_pmean", "state_sharding"]
