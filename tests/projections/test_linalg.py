"""Products in a precision that suits the device."""

import types

import jax
import jax.numpy as jnp
import pytest

from flora_jax.projections import linalg
from flora_jax.projections.linalg import product

_THREE_OF_TF32, _FULL = "num_primitive_operations = 3", "precision = [HIGHEST, HIGHEST]"


@pytest.mark.parametrize(
    ("capabilities", "wanted"),
    [
        ([], _THREE_OF_TF32),
        (["9.0"], _THREE_OF_TF32),
        (["8.0", "7.5"], _FULL),
    ],
)
def test_gpus_without_tf32_multiply_in_float32(capabilities, wanted, monkeypatch):
    found = [types.SimpleNamespace(compute_capability=x) for x in capabilities]

    def devices(platform):
        assert platform == "cuda"
        if not found:
            raise RuntimeError("Unknown backend cuda")
        return found

    # Of each case's devices, and afterwards of the real ones.
    monkeypatch.setattr(linalg, "_float32_on_cuda", linalg._float32_on_cuda.__wrapped__)
    monkeypatch.setattr(jax, "devices", devices)
    x, right = jnp.ones((4, 8)), jnp.ones((8, 2))
    traced = jax.jit(lambda *arrays: product(*arrays, -1)).trace(x, right)
    assert wanted in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert (
        "precision = [HIGH, HIGH]"
        in traced.lower(lowering_platforms=("tpu",)).as_text()
    )
