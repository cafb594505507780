"""Products in a precision that suits the device."""

import types

import jax
import jax.numpy as jnp
import numpy as np
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


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize(("inner", "outer"), [(8, 40), (128, 200), (40, 8)])
@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("right_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("weighed", [False, True])
def test_products_on_a_tpu_keep_sixteen_bits(
    axis, inner, outer, x_dtype, right_dtype, weighed, monkeypatch
):
    einsum = jnp.einsum

    def on_tpu(subscripts, *arrays, precision):
        if precision == "default":
            arrays = [jax.lax.reduce_precision(x, 8, 7) for x in arrays]
        return einsum(subscripts, *arrays, precision="highest")

    monkeypatch.setattr(jnp, "einsum", on_tpu)
    monkeypatch.setattr(
        jax.lax, "platform_dependent", lambda *arrays, tpu, **_: tpu(*arrays)
    )
    rng = np.random.default_rng(0)
    shape = (3, 5, inner) if axis == -1 else (3, inner, 5)
    x = jnp.asarray(rng.normal(size=shape), x_dtype)
    right = jnp.asarray(rng.normal(size=(3, inner, outer)), right_dtype)
    weights = jnp.asarray(rng.uniform(size=(3, inner)), "float32") if weighed else None
    found = jax.jit(lambda *x: product(*x[:2], axis, *x[2:]))(x, right, weights)

    def multiplied(x, right):
        return x @ right if axis == -1 else right.swapaxes(-1, -2) @ x

    x, right = np.asarray(x, np.float64), np.asarray(right, np.float64)
    if weighed:
        right = right * np.asarray(weights, np.float64)[..., None]
    bound = 2.0**-16 * multiplied(np.abs(x), np.abs(right))
    assert found.dtype == jnp.float32
    assert np.all(np.abs(found - multiplied(x, right)) <= bound)
