"""A step on one matrix or a tree, and sketched gradients of a model, compiled again."""

import jax
import numpy as np

import flora_jax as fj
from experiments.accelerators.run import measure
from experiments.activations import run as activations
from experiments.common.chips import CHIPS, placed_on
from experiments.common.traffic import kernels, split
from experiments.step_memory import run as step_memory
from tests.experiments.accelerators.test_accelerators import rows
from tests.experiments.activations.test_activations import row
from tests.experiments.step_memory.test_step_memory import rows as rows_of_models

# With rows in float32 and in bfloat16.
METHODS = [
    "adamw",
    "adamw_int8",
    "flora",
    "flora_adamw",
    "apollo",
    "flora_accumulation",
]


def check(chip, method, dtype, problem="leaf"):
    """It moves and holds no more than the committed row says."""
    expected = rows(chip=chip, problem=problem, dtype=dtype)[method]
    found = measure(expected)
    # One more pass over the gradient would be a seventh or more.
    assert found["step"] <= 1.03 * expected["step"]
    assert found["seconds"] <= 1.03 * expected["seconds"]
    assert found["temporaries"] <= expected["temporaries"] + 0.03 * found["parameters"]
    return found


def check_accumulator(chip):
    """A micro-step reads the gradient once, besides the sketch."""
    accumulator = fj.compressed_accumulator(256)
    grads = jax.ShapeDtypeStruct((4096, 11008), "float32")
    carry = jax.eval_shape(accumulator.init, grads)
    carry, grads = placed_on(CHIPS[chip], (carry, grads))
    add = jax.jit(accumulator.update, donate_argnums=0)
    compiled = add.lower(carry, grads, np.int32(3)).compile()
    always, _ = split(kernels(compiled.as_text()))
    size = 4 * grads.size
    assert sum(each.nbytes for each in always) <= 1.15 * size
    assert compiled.memory_analysis().temp_size_in_bytes <= 0.15 * size


def check_training(chip, model, rank, embeddings, accumulator_dtype="float32"):
    """The step on sketched gradients needs what the committed row says."""
    (expected,) = rows_of_models(
        chip=chip,
        model=model,
        method="sketched_accumulation",
        rank=rank,
        embeddings=embeddings,
        accumulator_dtype=accumulator_dtype,
        rounding="nearest",
    )
    assert step_memory.measure(expected)["total"] <= 1.01 * expected["total"]


def check_activations(chip, most):
    """Sketches of activations take what the committed row says, and less than these.

    Args:
        chip: what is compiled for.
        most: bound on temporaries of sketched gradients, over those of full ones.
    """
    fields = {"model": "gpt2", "layers": "scanned", "precision": "default"}
    full, expected = (
        row(chip=chip, **fields, gradients=kind) for kind in ("full", "sketched")
    )
    found = activations.measure(expected)["temporaries"]
    assert found <= 1.03 * expected["temporaries"]
    assert found <= most * full["temporaries"]
