"""How numbers are stored: block-wise codes of 8 or 16 bits."""

from flora_jax.quantization._blockwise import (
    CODES,
    code_dtype,
    decode,
    encode,
    scale_shape,
)

__all__ = ["CODES", "code_dtype", "decode", "encode", "scale_shape"]
