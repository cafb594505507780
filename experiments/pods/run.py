"""The TPU compiler's account of an optimizer step on a pod."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

import flora_jax as fj
from experiments.common import chips, records
from experiments.common.chips import CHIPS
from experiments.common.collectives import Collective, collectives, total
from experiments.common.compiled import measure_missing
from experiments.common.methods import METHODS, Settings
from experiments.common.traffic import account
from experiments.pods import report
from experiments.pods.config import LAYOUTS, MODELS, Config, Model

P = jax.P


def run(config: Config) -> None:
    """Compiles the step of every optimizer on every pod, and writes the table.

    Raises:
        ConfigError: the TPU's compiler is not installed.
    """
    path = config.output_dir / "pods.jsonl"
    axes = {
        "model": config.models,
        "dtype": config.dtypes,
        "pod": config.pods,
        "layout": config.layouts,
        "method": config.methods,
        "rank": (config.rank,),
    }

    measure_missing(path, records.combinations(axes), measured)
    report.write(path)


def measured(case: records.Row) -> records.Row:
    """Compiles the step of one `model` on one `pod` in one `layout`; see `measure`."""
    pod = chips.topology("tpu", case["pod"])
    shape = LAYOUTS[case["pod"]][case["layout"]]
    mesh = topologies.make_mesh(pod, shape, ("fsdp", "tensor"))
    return measure(MODELS[case["model"]], mesh, case)


def measure(model: Model, mesh: jax.sharding.Mesh, case: records.Row) -> records.Row:
    """Compiles the step on one mesh.

    Args:
        model: the sizes.
        mesh: with axes "fsdp" and "tensor".
        case: `pod`, `dtype`, `method` and `rank`.

    Returns:
        Bytes on one chip: of the `arguments` (parameters, state and gradients), of
        `temporaries`, of the collectives that every step sends (`sent`) and that some
        send besides (`sent_besides`), by kind; of the `largest` array that each kind
        sends at once; of all sketches (`sketches`) and gradients (`gradients`), which
        are sharded over "tensor" alone, and of the `largest_sketch`. Processor seconds
        of `compilation`, and the `account` of the kernels on one chip. If the compiler
        refuses, what the program would take (`refused`).
    """
    # On Explicit axes an optimizer of optax would have to name shardings itself.
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)
    shapes, specs = parameters(model, case["dtype"])
    shardings = {name: jax.NamedSharding(mesh, spec) for name, spec in specs.items()}
    placed = {k: x.update(sharding=shardings[k]) for k, x in shapes.items()}
    sketch = fj.Sketch(case["rank"], mask=fj.not_embeddings).with_metadata(placed)
    settings = Settings(sketch, estimator="nesterov")
    tx = METHODS[case["method"]].optimizer(1e-3, settings)
    found = _sketches(sketch, shapes, mesh.shape["tensor"])
    with jax.set_mesh(mesh):
        states = fj.state_sharding(tx, shapes, shardings)
        try:
            compiled, seconds = chips.compile_step(tx, shapes, shardings, states)
        except jax.errors.JaxRuntimeError as error:
            if (refused := chips.refused_bytes(error)) is None:
                raise
            return found | {"refused": refused}
    memory = compiled.memory_analysis()
    text = compiled.as_text()
    sent = collectives(text)
    counted = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "sent": _by_kind([x for x in sent if not x.optional]),
        "sent_besides": _by_kind([x for x in sent if x.optional]),
        "largest": _largest(sent),
        "compilation": seconds,
    }
    return found | counted | account(text, CHIPS[case["pod"].split(":")[0]])


def parameters(model: Model, dtype: str) -> tuple[dict[str, Any], dict[str, P]]:
    """Returns shapes and mesh axes of a Llama's parameters, as trainers shard them."""
    d, f, stack = model.width, model.mlp, model.layers
    columns, rows = ("fsdp", "tensor"), ("tensor", "fsdp")
    sizes = {
        "q": ((d, model.queries), columns),
        "k": ((d, model.keys), columns),
        "v": ((d, model.keys), columns),
        "o": ((model.queries, d), rows),
        "gate": ((d, f), columns),
        "up": ((d, f), columns),
        "down": ((f, d), rows),
        "attention_norm": ((d,), (None,)),
        "mlp_norm": ((d,), (None,)),
    }
    stacked = {k: ((stack, *s), (None, *axes)) for k, (s, axes) in sizes.items()}
    every = stacked | {
        "embed": ((model.vocabulary, d), rows),
        "lm_head": ((d, model.vocabulary), columns),
        "norm": ((d,), (None,)),
    }
    shapes = {
        k: jax.ShapeDtypeStruct(s, jnp.dtype(dtype)) for k, (s, _) in every.items()
    }
    return shapes, {name: P(*axes) for name, (_, axes) in every.items()}


def _sketches(sketch: fj.Sketch, shapes: Any, tensor: int) -> records.Row:
    """Bytes of float32 sketches, and of the gradients that they are taken of."""
    plans = [plan for plan in sketch.plan(shapes) if not plan.dense]
    itemsize = shapes["q"].dtype.itemsize
    sketches = [4 * math.prod(plan.state_shape) // tensor for plan in plans]
    gradients = [itemsize * math.prod(plan.shape) // tensor for plan in plans]
    return {
        "gradients": sum(gradients),
        "sketches": sum(sketches),
        "largest_sketch": max(sketches),
    }


def _largest(sent: list[Collective]) -> dict[str, int]:
    found = dict.fromkeys(_by_kind(sent), 0)
    for each in sent:
        found[each.kind] = max(found[each.kind], *each.sizes)
    return found


def _by_kind(sent: list[Collective]) -> dict[str, int]:
    kinds = sorted({each.kind for each in sent})
    return {kind: total([x for x in sent if x.kind == kind]) for kind in kinds}
