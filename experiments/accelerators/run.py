"""The compilers' account of an optimizer step on one chip."""

from typing import Any

import jax
import jax.numpy as jnp

import flora_jax as fj
from experiments.accelerators import report
from experiments.accelerators.config import Config
from experiments.common import chips, records
from experiments.common.chips import CHIPS
from experiments.common.compiled import measure_missing
from experiments.common.methods import METHODS, Settings
from experiments.common.state_bytes import tree_bytes
from experiments.common.traffic import account
from experiments.models import build


def run(config: Config) -> None:
    """Compiles the step of every optimizer, and writes table and picture.

    Raises:
        ConfigError: a chip's compiler is not installed.
    """
    path = config.output_dir / "steps.jsonl"
    axes = {
        "chip": config.chips,
        "problem": config.problems,
        "dtype": config.dtypes,
        "method": config.methods,
        "calls": config.calls,
        "rank": (config.rank,),
    }
    measure_missing(path, records.combinations(axes), measure)
    report.write(path)


def measure(case: records.Row) -> records.Row:
    """Compiles one step.

    Args:
        case: `chip`, `problem`, `dtype`, `method`, `calls` and `rank`.

    Returns:
        Bytes of the `parameters`, of the `arguments` (parameters, state and gradients)
        and of the `temporaries`; processor seconds of the `compilation`; and the
        `account` of its kernels.
    """
    chip, one_call = CHIPS[case["chip"]], case["calls"] == "one"
    tx, shapes = optimizer_and_shapes(case)
    compiled, seconds = chips.compile_on_one(chip, tx, shapes, one_call)
    memory = compiled.memory_analysis()
    return {
        "parameters": tree_bytes(shapes),
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "compilation": seconds,
    } | account(compiled.as_text(), chip)


def optimizer_and_shapes(case: records.Row) -> tuple[Any, Any]:
    """Returns the optimizer of a case, and the shapes of its parameters."""
    problem, dtype = case["problem"], case["dtype"]
    if problem == "leaf":
        shapes = {"kernel": jax.ShapeDtypeStruct((4096, 11008), jnp.dtype(dtype))}
    else:
        shapes = build.shapes(problem, dtype)
    sketch = fj.Sketch(case["rank"], mask=fj.not_embeddings)
    settings = Settings(sketch, micro_batches=16, estimator="nesterov")
    return METHODS[case["method"]].optimizer(1e-3, settings), shapes
