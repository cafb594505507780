"""A step on one matrix, compiled again."""

from experiments.accelerators.run import measure
from tests.experiments.accelerators.test_accelerators import rows

# With rows in float32 and in bfloat16.
METHODS = [
    "adamw",
    "adamw_int8",
    "flora",
    "flora_adamw",
    "apollo",
    "flora_accumulation",
]


def check(chip, method, dtype):
    """It moves and holds no more than the committed row says."""
    expected = rows(chip=chip, problem="leaf", dtype=dtype)[method]
    found = measure(expected)
    # One more pass over the gradient would be a seventh or more.
    assert found["step"] <= 1.03 * expected["step"]
    assert found["seconds"] <= 1.03 * expected["seconds"]
    assert found["temporaries"] <= expected["temporaries"] + 0.03 * found["parameters"]
    return found
