"""The chips' compilers' account of a training step.

Model, gradient and optimizer are those of a run, lowered on shapes and compiled with
parameters and state donated. A step of an accumulation is one micro-step, which updates
the parameters if it ends a cycle: its account is that of the whole cycle.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import Literal

import flora_jax as fj
from experiments.common import chips, lora, records
from experiments.common.chips import CHIPS
from experiments.common.compiled import measure_missing
from experiments.common.methods import METHODS, Method, Settings, built
from experiments.common.state_bytes import step_bytes, tree_bytes
from experiments.models.build import create, mean_loss
from experiments.models.config import PUBLISHED, DecoderConfig
from experiments.step_memory import report
from experiments.step_memory.config import Config

_MICRO_BATCHES = 16
# Above the aspect ratio of published embeddings.
_EMBEDDINGS = 256
_LENGTHS = ("batch_size", "source_length", "target_length")
_TYPES = ("dtype", "accumulator_dtype", "rounding")
_SETTINGS = (*_LENGTHS, "projection", *_TYPES, "remat", "scan")


def run(config: Config) -> None:
    """Compiles the step of every model, method and rank, and reports its bytes.

    Raises:
        ConfigError: a chip's compiler is not installed.
    """
    path = config.output_dir / "steps.jsonl"
    measure_missing(path, _cases(config), measure)
    report.write(path)


def _cases(config: Config) -> list[records.Row]:
    """All combinations; without a rank where none is chosen."""
    cases = []
    each = itertools.product(config.chips, config.models, config.methods)
    for chip, model, name in each:
        method = METHODS[name]
        for rank in config.ranks if method.ranked else (None,):
            case = {"chip": chip, "model": model, "method": name, "rank": rank}
            case["embeddings"] = config.embeddings and method.compressed
            case |= {field: getattr(config, field) for field in _SETTINGS}
            cases.append(case)
    return cases


def measure(case: records.Row) -> records.Row:
    """Compiles one step.

    Args:
        case: `chip`, `model`, `method`, `rank`, and the settings of `Config` that say
            what is compiled.

    Returns:
        Bytes of `parameters`, of those that are `trained`, of the `state`, of the
        `gradients` or their sketches, of the `activations` that the forward pass keeps,
        of the `temporaries`, which hold these, and of all that is in memory while the
        step runs (`total`); processor seconds of the `compilation`. If the compiler
        refuses, the bytes that it asks for (`refused`) in place of the last three.
    """
    method, rank = METHODS[case["method"]], case["rank"]
    layers = {name: case[name] for name in ("dtype", "remat", "scan")}
    sizes = dataclasses.replace(PUBLISHED[case["model"]], dropout=0.0, **layers)
    graphdef, trained, frozen = parameters(sizes, method, rank)
    cast = functools.partial(optax.tree.cast, dtype=case["dtype"])
    trained, frozen = jax.eval_shape(cast, (trained, frozen))
    aspect = _EMBEDDINGS if case["embeddings"] else 16
    projection = built(case["projection"]) if method.kind == "accumulation" else None
    sketch = fj.Sketch(rank or 1, projection, max_aspect_ratio=aspect)
    tx = optimizer(method, sketch, case["accumulator_dtype"])

    def loss(trained: Any, frozen: Any, batch: Any) -> jax.Array:
        return mean_loss(graphdef, lora.join(trained, frozen), batch)

    def step(trained: Any, state: Any, frozen: Any, batch: Any, key: Any) -> Any:
        given = state, trained, frozen, batch
        value, grads = method.value_and_grad(loss, sketch, *given)
        key = key if case["rounding"] == "stochastic" else None
        return *fj.update_and_apply(tx, grads, state, trained, key=key), value

    state, batch = jax.eval_shape(tx.init, trained), _batch(case, sizes)
    given = state, trained, frozen, batch
    _, grads = jax.eval_shape(
        lambda *given: method.value_and_grad(loss, sketch, *given), *given
    )
    found = {
        "parameters": tree_bytes((trained, frozen)),
        "trained": tree_bytes(trained),
        "state": tree_bytes(state),
        "gradients": tree_bytes(grads),
        "activations": _kept(loss, trained, frozen, batch),
    }
    key = jax.eval_shape(jax.random.key, 0)
    arguments = chips.placed_on(
        CHIPS[case["chip"]], (trained, state, frozen, batch, key)
    )
    started = time.process_time()
    try:
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if (refused := chips.refused_bytes(error)) is None:
            raise
        return found | {"refused": refused}
    return found | {
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "total": step_bytes(compiled),
        "compilation": round(time.process_time() - started, 1),
    }


def _kept(loss: Callable[..., jax.Array], trained: Any, *others: Any) -> int:
    """Bytes that the forward pass keeps for the backward pass, besides parameters.

    By JAX's account: without sketches of activations, and before anything is fused.
    """

    def residuals(trained: Any, *others: Any) -> list[jax.Array]:
        pullback = jax.vjp(lambda params: loss(params, *others), trained)[1]
        return jax.tree.leaves(pullback)

    jaxpr = jax.make_jaxpr(residuals)(trained, *others).jaxpr
    kept = {x for x in jaxpr.outvars if not isinstance(x, Literal)}
    return tree_bytes([x.aval for x in kept.difference(jaxpr.invars)])


def optimizer(method: Method, sketch: fj.Sketch, dtype: str = "float32") -> Any:
    """Returns the optimizer of a method; around sketched accumulators fj.adafactor.

    optax's does the same, from mean gradients in full.
    """
    if method.kind == "accumulation" and method.compressed:
        inner = fj.adafactor(1e-3)
        return fj.compressed_accumulation(inner, _MICRO_BATCHES, sketch, dtype=dtype)
    return method.optimizer(1e-3, Settings(sketch, micro_batches=_MICRO_BATCHES))


def parameters(sizes: Any, method: Method, rank: int | None) -> tuple[Any, Any, Any]:
    """Returns a model's static part, and shapes of trained and frozen parameters."""
    if not method.adapters:
        return *jax.eval_shape(lambda: create(sizes, 0)), {}
    adapted = jax.eval_shape(lambda: lora.add(*create(sizes, 0), rank, rank, 0))
    return adapted[0], *lora.divide(adapted[1], tune_rest=False)


def _batch(case: records.Row, sizes: Any) -> dict[str, jax.ShapeDtypeStruct]:
    lengths = {"source": case["source_length"], "target": case["target_length"]}
    if isinstance(sizes, DecoderConfig):
        lengths = {"tokens": sum(lengths.values()) + 1}
    rows = case["batch_size"]
    return {k: jax.ShapeDtypeStruct((rows, n), jnp.int32) for k, n in lengths.items()}
