"""What is kept compressed: accumulators, momentum, second moments."""

from flora_jax.transforms.accumulation import NAME as ACCUMULATION
from flora_jax.transforms.accumulation import (
    CompressedAccumulationState,
    compressed_accumulation,
    has_updated,
)
from flora_jax.transforms.accumulator import (
    CompressedAccumulatorCarry,
    compressed_accumulator,
)
from flora_jax.transforms.factored_rms import (
    FactoredRmsState,
    factored_rms_part,
    scale_by_factored_rms,
)
from flora_jax.transforms.momentum import NAME as MOMENTUM
from flora_jax.transforms.momentum import (
    CompressedMomentumState,
    compressed_momentum,
    momentum_part,
)
from flora_jax.transforms.orthogonalize import NewtonSchulz, orthogonalize
from flora_jax.transforms.parameter_scale import scale_by_parameter_scale
from flora_jax.transforms.parts import OnSketch, Part, chain_parts, clip_part

__all__ = [
    "ACCUMULATION",
    "MOMENTUM",
    "CompressedAccumulationState",
    "CompressedAccumulatorCarry",
    "CompressedMomentumState",
    "FactoredRmsState",
    "NewtonSchulz",
    "OnSketch",
    "Part",
    "chain_parts",
    "clip_part",
    "compressed_accumulation",
    "compressed_accumulator",
    "compressed_momentum",
    "factored_rms_part",
    "has_updated",
    "momentum_part",
    "orthogonalize",
    "scale_by_factored_rms",
    "scale_by_parameter_scale",
]
