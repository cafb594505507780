"""What is kept compressed: accumulators, momentum, second moments."""

from flora_jax.transforms._accumulation import (
    CompressedAccumulationState,
    compressed_accumulation,
    has_updated,
)
from flora_jax.transforms._accumulator import (
    CompressedAccumulatorCarry,
    compressed_accumulator,
)
from flora_jax.transforms._chain import recipe
from flora_jax.transforms._diagnostics import LeafDiagnostics, diagnostics
from flora_jax.transforms._factored_rms import (
    FactoredRmsState,
    factored_rms_part,
    scale_by_factored_rms,
)
from flora_jax.transforms._leafwise import clip_part
from flora_jax.transforms._momentum import (
    CompressedMomentumState,
    compressed_momentum,
    momentum_part,
)
from flora_jax.transforms._orthogonalize import orthogonalize
from flora_jax.transforms._parameter_scale import scale_by_parameter_scale
from flora_jax.transforms._quantize_state import QuantizedState, quantize_state
from flora_jax.transforms._sketched_grad import (
    LeafReport,
    born_compressed,
    sketched_value_and_grad,
)
from flora_jax.transforms._sketched_gradients import SketchedGradients
from flora_jax.transforms._subspace import SubspaceState, scale_in_subspace

__all__ = [
    "CompressedAccumulationState",
    "CompressedAccumulatorCarry",
    "CompressedMomentumState",
    "FactoredRmsState",
    "LeafDiagnostics",
    "LeafReport",
    "QuantizedState",
    "SketchedGradients",
    "SubspaceState",
    "born_compressed",
    "clip_part",
    "compressed_accumulation",
    "compressed_accumulator",
    "compressed_momentum",
    "diagnostics",
    "factored_rms_part",
    "has_updated",
    "momentum_part",
    "orthogonalize",
    "quantize_state",
    "recipe",
    "scale_by_factored_rms",
    "scale_by_parameter_scale",
    "scale_in_subspace",
    "sketched_value_and_grad",
]
