"""Any inner transformation inside a subspace of each gradient."""

from flora_jax.subspace.transform import SubspaceState, scale_in_subspace

__all__ = ["SubspaceState", "scale_in_subspace"]
