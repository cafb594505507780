"""The GPU's compiler still says what the committed tables say.

Run by hand, in the environment that ``python -m experiments.accelerators --chips h100``
asks for, without a GPU; the output is in tests/results.
"""

import pytest

from tests.compilers.common import (
    METHODS,
    check,
    check_accumulator,
    check_activations,
    check_training,
)

pytest.importorskip("jax_plugins.xla_cuda13", reason="it needs the GPU's compiler")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_moves_and_holds_no_more(method, dtype):
    check("h100", method, dtype)


def test_products_with_stored_bases_use_tensor_cores():
    found = check("h100", "galore", "float32")
    assert set(found["flops"]) == {"3 of TF32"}


@pytest.mark.parametrize("model", ["t5-3b", "gpt2-xl"])
def test_a_model_trains_on_one_chip(model):
    check_training("h100", model, 16, True)


def test_an_accumulator_reads_the_gradient_once():
    check_accumulator("h100")


def test_sketches_take_less_than_activations():
    check_activations("h100", 0.75)
