"""The TPU's compiler still says what the committed table says of a step on one matrix.

It needs the extra `tpu-compiler`, and no TPU.
"""

import itertools

import jax
import pytest

from experiments.step_memory.run import measure
from tests.compilers.common import METHODS, check
from tests.experiments.step_memory.test_step_memory import rows

IN_FLOAT32 = ["flora_adamw_int8", "fira", "flora_muon_bfloat16"]


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """As in the commands: other tests have eight CPU devices."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        *itertools.product(METHODS, ["float32", "bfloat16"]),
        *itertools.product(IN_FLOAT32, ["float32"]),
    ],
)
def test_a_step_moves_and_holds_no_more(method, dtype):
    check("v5e", method, dtype)


def test_a_refresh_compiles_soon():
    found = check("v5e", "galore", "float32")
    assert found["temporaries"] <= 0.15 * found["parameters"]
    # Of a few dozen processor seconds: reflections and QDWH would take hundreds.
    assert found["compilation"] <= 100


def test_t5_3b_trains_on_one_chip():
    """All parameters, in float32: the compiler refuses what does not fit."""
    fields = {"method": "sketched_accumulation", "rank": 16, "embeddings": False}
    (expected,) = rows(chip="v5e", model="t5-3b", **fields)
    assert measure(expected)["total"] <= 1.01 * expected["total"]
