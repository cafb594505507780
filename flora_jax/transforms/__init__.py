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
from flora_jax.transforms._chain import chain_in_gradient_dtype
from flora_jax.transforms._factored_rms import FactoredRmsState, scale_by_factored_rms
from flora_jax.transforms._momentum import CompressedMomentumState, compressed_momentum

__all__ = [
    "CompressedAccumulationState",
    "CompressedAccumulatorCarry",
    "CompressedMomentumState",
    "FactoredRmsState",
    "chain_in_gradient_dtype",
    "compressed_accumulation",
    "compressed_accumulator",
    "compressed_momentum",
    "has_updated",
    "scale_by_factored_rms",
]
