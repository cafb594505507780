"""Any inner transformation inside a subspace of each gradient."""

from flora_jax.subspace.residuals import Apollo, Fira, FiraCode, Plain, Residual
from flora_jax.subspace.transform import SubspaceState, scale_in_subspace
from flora_jax.subspace.transports import Keep, LDAdam, PreserveRMS, Reset, Squared

__all__ = [
    "Apollo",
    "Fira",
    "FiraCode",
    "Keep",
    "LDAdam",
    "Plain",
    "PreserveRMS",
    "Reset",
    "Residual",
    "Squared",
    "SubspaceState",
    "scale_in_subspace",
]
