"""The GPU's compiler still says what the committed table says of a step on one matrix.

Run by hand, in the environment that ``python -m experiments.accelerators --chips h100``
asks for, without a GPU; the output is in tests/results.
"""

import pytest

from experiments.accelerators.run import measure
from tests.experiments.accelerators.test_accelerators import rows

pytest.importorskip("jax_plugins.xla_cuda13", reason="it needs the GPU's compiler")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "method",
    ["adamw", "adamw_int8", "flora", "flora_adamw", "apollo", "flora_accumulation"],
)
def test_a_step_moves_and_holds_no_more(method, dtype):
    expected = rows(chip="h100", problem="leaf", dtype=dtype)[method]
    found = measure(expected)
    # One more pass over the gradient would be a seventh or more.
    assert found["step"] <= 1.03 * expected["step"]
    assert found["seconds"] <= 1.03 * expected["seconds"]
    assert found["temporaries"] <= expected["temporaries"] + 0.03 * found["parameters"]


def test_products_with_stored_bases_use_tensor_cores():
    found = measure(rows(chip="h100", problem="leaf", dtype="float32")["galore"])
    assert set(found["flops"]) == {"3 of TF32"}
    adamw = rows(chip="h100", problem="leaf", dtype="float32")["adamw"]
    assert found["seconds"] < adamw["seconds"]
