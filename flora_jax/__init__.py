"""Optax gradient transformations that keep accumulators and momentum as sketches.

FLORA in JAX: gradient accumulators and optimizer moments are kept as random
projections, regenerated from a PRNG key that the optimizer state carries.

Hao, Cao, Mou, `FLORA: Low-Rank Adapters Are Secretly Gradient Compressors
<https://arxiv.org/abs/2402.03293>`_, ICML 2024.
"""

from flora_jax._validation import static_args
from flora_jax.leaves.plan import LeafPlan
from flora_jax.leaves.rules import plan_leaves
from flora_jax.leaves.spec import verify_state
from flora_jax.memory import (
    LeafMemory,
    MemoryPlan,
    memory_plan,
    rank_for_budget,
    ranks_for_budget,
)
from flora_jax.optimizers import (
    apollo,
    apollo_mini,
    dct_adamw,
    fira,
    flora,
    flora_adamw,
    galore,
)
from flora_jax.projections import (
    SRHT,
    AdaptiveProjection,
    CountSketch,
    Gaussian,
    ObliviousProjection,
    Orthogonal,
    Projection,
    Rademacher,
    TopDCT,
    TopSVD,
)
from flora_jax.sharding import compressed_pmean, state_sharding
from flora_jax.diagnostics import LeafDiagnostics, diagnostics
from flora_jax.quantization import QuantizedState, quantize_state
from flora_jax.sketched_grad import (
    LeafReport,
    born_compressed,
    sketched_value_and_grad,
)
from flora_jax.sketching.sketched_gradients import SketchedGradients
from flora_jax.subspace import SubspaceState, scale_in_subspace
from flora_jax.transforms import (
    CompressedAccumulationState,
    CompressedAccumulatorCarry,
    CompressedMomentumState,
    FactoredRmsState,
    compressed_accumulation,
    compressed_accumulator,
    compressed_momentum,
    has_updated,
    orthogonalize,
    scale_by_factored_rms,
)

__all__ = [
    "SRHT",
    "AdaptiveProjection",
    "CompressedAccumulationState",
    "CompressedAccumulatorCarry",
    "CompressedMomentumState",
    "CountSketch",
    "FactoredRmsState",
    "Gaussian",
    "LeafDiagnostics",
    "LeafMemory",
    "LeafPlan",
    "LeafReport",
    "MemoryPlan",
    "ObliviousProjection",
    "Orthogonal",
    "Projection",
    "QuantizedState",
    "Rademacher",
    "SketchedGradients",
    "SubspaceState",
    "TopDCT",
    "TopSVD",
    "apollo",
    "apollo_mini",
    "born_compressed",
    "compressed_accumulation",
    "compressed_accumulator",
    "compressed_momentum",
    "compressed_pmean",
    "dct_adamw",
    "diagnostics",
    "fira",
    "flora",
    "flora_adamw",
    "galore",
    "has_updated",
    "memory_plan",
    "orthogonalize",
    "plan_leaves",
    "quantize_state",
    "rank_for_budget",
    "ranks_for_budget",
    "scale_by_factored_rms",
    "scale_in_subspace",
    "sketched_value_and_grad",
    "state_sharding",
    "static_args",
    "verify_state",
]
