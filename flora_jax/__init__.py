"""Optax gradient transformations that keep accumulators and momentum as sketches.

FLORA in JAX: gradient accumulators and optimizer moments are kept as random
projections, regenerated from a PRNG key that the optimizer state carries.

Hao, Cao, Mou, `FLORA: Low-Rank Adapters Are Secretly Gradient Compressors
<https://arxiv.org/abs/2402.03293>`_, ICML 2024.
"""

from flora_jax._checks import static_args
from flora_jax._plan import LeafPlan
from flora_jax._rules import plan_leaves
from flora_jax._spec import verify_state
from flora_jax.optimizers import flora
from flora_jax.projections import (
    SRHT,
    CountSketch,
    Gaussian,
    Orthogonal,
    Projection,
    Rademacher,
)
from flora_jax.transforms import (
    CompressedAccumulationState,
    CompressedAccumulatorCarry,
    CompressedMomentumState,
    FactoredRmsState,
    compressed_accumulation,
    compressed_accumulator,
    compressed_momentum,
    has_updated,
    scale_by_factored_rms,
)

__all__ = [
    "SRHT",
    "CompressedAccumulationState",
    "CompressedAccumulatorCarry",
    "CompressedMomentumState",
    "CountSketch",
    "FactoredRmsState",
    "Gaussian",
    "LeafPlan",
    "Orthogonal",
    "Projection",
    "Rademacher",
    "compressed_accumulation",
    "compressed_accumulator",
    "compressed_momentum",
    "flora",
    "has_updated",
    "plan_leaves",
    "scale_by_factored_rms",
    "static_args",
    "verify_state",
]
