"""Optax gradient transformations that keep accumulators and momentum as sketches.

FLORA in JAX: gradient accumulators and optimizer moments are kept as random
projections, regenerated from a PRNG key that the optimizer state carries.

Hao, Cao, Mou, `FLORA: Low-Rank Adapters Are Secretly Gradient Compressors
<https://arxiv.org/abs/2402.03293>`_, ICML 2024.
"""

from flora_jax.diagnostics import LeafDiagnostics, diagnostics
from flora_jax.leaves import (
    LeafPlan,
    LeafRules,
    embeddings,
    not_embeddings,
    verify_state,
)
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
    flora_muon,
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
from flora_jax.quantization import QuantizedState, quantize_state
from flora_jax.sharding import compressed_pmean, state_sharding
from flora_jax.sketched_grad import (
    LeafReport,
    explain_sketched_gradients,
    sketched_value_and_grad,
)
from flora_jax.sketching import Sketch, SketchCycle, SketchedGradients, plan_leaves
from flora_jax.subspace import (
    Apollo,
    Fira,
    FiraCode,
    Keep,
    LDAdam,
    Plain,
    PreserveRMS,
    Reset,
    Squared,
    SubspaceState,
    scale_in_subspace,
)
from flora_jax.transforms import (
    CompressedAccumulationState,
    CompressedAccumulatorCarry,
    CompressedMomentumState,
    FactoredRmsState,
    NewtonSchulz,
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
    "Apollo",
    "CompressedAccumulationState",
    "CompressedAccumulatorCarry",
    "CompressedMomentumState",
    "CountSketch",
    "FactoredRmsState",
    "Fira",
    "FiraCode",
    "Gaussian",
    "Keep",
    "LDAdam",
    "LeafDiagnostics",
    "LeafMemory",
    "LeafPlan",
    "LeafReport",
    "LeafRules",
    "MemoryPlan",
    "NewtonSchulz",
    "ObliviousProjection",
    "Orthogonal",
    "Plain",
    "PreserveRMS",
    "Projection",
    "QuantizedState",
    "Rademacher",
    "Reset",
    "Sketch",
    "SketchCycle",
    "SketchedGradients",
    "Squared",
    "SubspaceState",
    "TopDCT",
    "TopSVD",
    "apollo",
    "apollo_mini",
    "compressed_accumulation",
    "compressed_accumulator",
    "compressed_momentum",
    "compressed_pmean",
    "dct_adamw",
    "diagnostics",
    "embeddings",
    "explain_sketched_gradients",
    "fira",
    "flora",
    "flora_adamw",
    "flora_muon",
    "galore",
    "has_updated",
    "memory_plan",
    "not_embeddings",
    "orthogonalize",
    "plan_leaves",
    "quantize_state",
    "rank_for_budget",
    "ranks_for_budget",
    "scale_by_factored_rms",
    "scale_in_subspace",
    "sketched_value_and_grad",
    "state_sharding",
    "verify_state",
]
