"""Optax gradient transformations that keep accumulators and momentum as sketches.

FLORA in JAX: gradient accumulators and optimizer moments are kept as random
projections, regenerated from a PRNG key that the optimizer state carries.

Hao, Cao, Mou, `FLORA: Low-Rank Adapters Are Secretly Gradient Compressors
<https://arxiv.org/abs/2402.03293>`_, ICML 2024.
"""

from flora_jax.diagnostics import LeafDiagnostics, diagnostics
from flora_jax.leaves.plan import LeafPlan
from flora_jax.leaves.rules import LeafRules, embeddings, not_embeddings
from flora_jax.leaves.spec import verify_state
from flora_jax.memory.budget import rank_for_budget, ranks_for_budget
from flora_jax.memory.planner import LeafMemory, MemoryPlan, memory_plan
from flora_jax.optimizers import (
    adafactor,
    apollo,
    apollo_mini,
    dct_adamw,
    fira,
    flora,
    flora_adamw,
    flora_muon,
    galore,
)
from flora_jax.projections.base import (
    AdaptiveProjection,
    ObliviousProjection,
    Projection,
)
from flora_jax.projections.count_sketch import CountSketch
from flora_jax.projections.gaussian import Gaussian
from flora_jax.projections.orthogonal import Orthogonal
from flora_jax.projections.rademacher import Rademacher
from flora_jax.projections.srht import SRHT
from flora_jax.projections.top_dct import TopDCT
from flora_jax.projections.top_svd import TopSVD
from flora_jax.quantization.quantize_state import QuantizedState, quantize_state
from flora_jax.sharding.compressed_pmean import compressed_pmean
from flora_jax.sharding.state_sharding import state_sharding
from flora_jax.sketched_grad.api import (
    LeafReport,
    explain_sketched_gradients,
    sketched_value_and_grad,
)
from flora_jax.sketching.sketch import Sketch, SketchCycle, plan_leaves
from flora_jax.sketching.sketcher import SketchedGradients
from flora_jax.subspace.residuals import Apollo, Fira, FiraCode, Plain, Residual
from flora_jax.subspace.transform import SubspaceState, scale_in_subspace
from flora_jax.subspace.transports import (
    Keep,
    LDAdam,
    PreserveRMS,
    Reset,
    Squared,
    Transport,
)
from flora_jax.transforms.accumulation import (
    CompressedAccumulationState,
    compressed_accumulation,
    has_updated,
)
from flora_jax.transforms.accumulator import (
    CompressedAccumulatorCarry,
    compressed_accumulator,
)
from flora_jax.transforms.apply import apply_updates, update_and_apply
from flora_jax.transforms.factored_rms import FactoredRmsState, scale_by_factored_rms
from flora_jax.transforms.momentum import CompressedMomentumState, compressed_momentum
from flora_jax.transforms.orthogonalize import (
    NewtonSchulz,
    RowNormalization,
    orthogonalize,
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
    "Residual",
    "RowNormalization",
    "Sketch",
    "SketchCycle",
    "SketchedGradients",
    "Squared",
    "SubspaceState",
    "TopDCT",
    "TopSVD",
    "Transport",
    "adafactor",
    "apollo",
    "apollo_mini",
    "apply_updates",
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
    "update_and_apply",
    "verify_state",
]
