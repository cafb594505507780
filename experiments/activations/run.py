"""The chips' compilers' account of a loss and its gradients.

The program ends with the gradients: what it holds besides parameters and gradients is
for the most part what the forward pass keeps for the backward pass.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

import flora_jax as fj
from experiments.activations import report
from experiments.activations.config import Config
from experiments.common import chips, records
from experiments.common.chips import CHIPS
from experiments.common.compiled import measure_missing
from experiments.models.build import Params, create, mean_loss
from experiments.models.config import PUBLISHED

# Kernels that read the same activations, which one sketch then serves.
_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def run(config: Config) -> None:
    """Compiles every combination, and writes table and picture.

    Raises:
        ConfigError: a chip's compiler is not installed.
    """
    path = config.output_dir / "gradients.jsonl"
    axes = {
        "chip": config.chips,
        "model": config.models,
        "layers": config.layers,
        "precision": config.precisions,
        "gradients": config.gradients,
        "rank": (config.rank,),
        "batch_size": (config.batch_size,),
        "length": (config.length,),
    }
    measure_missing(path, records.combinations(axes), measure)
    report.write(path)


def measure(case: records.Row) -> records.Row:
    """Compiles value and gradient.

    Args:
        case: `chip`, `model`, `layers`, `precision`, `gradients`, `rank`, `batch_size`
            and `length`.

    Returns:
        Bytes of the `temporaries` and of the `outputs` (loss and gradients);
        floating-point `operations` by the compiler's account, where a loop counts as
        one of its iterations; processor seconds of the `compilation`.
    """
    function, arguments = program(case)
    given = chips.placed_on(CHIPS[case["chip"]], arguments)
    precision = None if case["precision"] == "default" else case["precision"]
    started = time.process_time()
    with jax.default_matmul_precision(precision):
        compiled = jax.jit(function).lower(*given).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return {
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "operations": cost.get("flops"),
        "compilation": round(time.process_time() - started, 1),
    }


def program(case: records.Row) -> tuple[Any, Any]:
    """Returns the function that is compiled, and the shapes of its arguments."""
    looped, again = case["layers"] != "unrolled", case["layers"] == "recomputed"
    sizes = dataclasses.replace(
        PUBLISHED[case["model"]], dropout=0.0, scan=looped, remat=again
    )
    graphdef, params = jax.eval_shape(lambda: create(sizes, 0))
    shape = (case["batch_size"], case["length"] + 1)
    batch = {"tokens": jax.ShapeDtypeStruct(shape, jnp.int32)}

    def loss(params: Params, batch: Any) -> jax.Array:
        return mean_loss(graphdef, params, batch)

    if case["gradients"] == "full":
        return jax.value_and_grad(loss), (params, batch)
    sketch = fj.Sketch(
        case["rank"],
        side="left",
        mask=fj.not_embeddings,
        same_projection=_SAME_INPUT,
    )

    def sketched(cycle: Any, params: Params, batch: Any) -> tuple[jax.Array, Any]:
        value, grads = fj.sketched_value_and_grad(loss, sketch)(cycle, params, batch)
        return value, grads.tree

    cycle = jax.eval_shape(lambda: sketch.cycle(0))
    return sketched, (cycle, params, batch)
