"""How moments are stored: block-wise codes of 8 or 16 bits."""

from flora_jax.quantization.blockwise import (
    CODES,
    code_dtype,
    decode,
    encode,
    scale_shape,
)
from flora_jax.quantization.quantize_state import QuantizedState, quantize_state

__all__ = [
    "CODES",
    "QuantizedState",
    "code_dtype",
    "decode",
    "encode",
    "quantize_state",
    "scale_shape",
]
