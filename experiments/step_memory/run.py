"""The compiler's account of an accumulate step and an apply step.

Model, gradient, accumulator and optimizer are those of a run, lowered on shapes and
compiled with the buffers donated that a run donates; nothing is allocated. The two are
programs of their own, since in one without donation the outputs would hide the
accumulator. FLORA sketches every matrix of an aspect ratio up to 16, as in the paper;
the other experiments leave position embeddings out as well.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.progress import track

import flora_jax as fj
from experiments.common import lora, records
from experiments.common.methods import METHODS, Method, Settings, base_optimizer, built
from experiments.common.report import publish
from experiments.common.state_bytes import step_bytes, tree_bytes
from experiments.models.build import create, mean_loss
from experiments.models.config import PUBLISHED, GPT2Config
from experiments.step_memory import report
from experiments.step_memory.config import Config

_MICRO_BATCHES = 16


def run(config: Config) -> None:
    """Compiles the steps of every model, method and rank, and reports their bytes."""
    wanted = [
        (model, method, rank)
        for model in config.models
        for method in config.methods
        for rank in (config.ranks if METHODS[method].ranked else (None,))
    ]
    rows = [measure(config, *each) for each in track(wanted, "compiling")]
    path = config.output_dir / "step_memory.json"
    publish(path, config, {"rows": rows}, report.write)


def measure(config: Config, model: str, name: str, rank: int | None) -> records.Row:
    """Compiles both steps of one method and adds up their bytes.

    Returns:
        Bytes of `parameters`, of those that are `trained`, of the state of the
        `optimizer`, of the `accumulator`; of each step (arguments, outputs and
        temporaries without aliases) and of its temporaries.
    """
    method = METHODS[name]
    layers = {"dtype": config.dtype, "remat": config.remat, "scan": config.scan}
    sizes = dataclasses.replace(PUBLISHED[model], dropout=0.0, **layers)
    graphdef, trained, frozen = parameters(sizes, method, rank)
    base = base_optimizer(1e-3, Settings(base=method.base or "adafactor"))
    sketch = fj.Sketch(rank or 1, projection=built(config.projection))
    accumulator = fj.compressed_accumulator(sketch) if method.compressed else _full()
    acc, opt_state = (jax.eval_shape(x.init, trained) for x in (accumulator, base))

    def loss(trained: Any, frozen: Any, batch: Any) -> jax.Array:
        return mean_loss(graphdef, lora.join(trained, frozen), batch)

    def accumulate(trained: Any, frozen: Any, acc: Any, batch: Any) -> Any:
        given = sketch.cycle(0), trained, frozen, batch
        value, grads = method.value_and_grad(loss, sketch, *given)
        return accumulator.update(acc, grads, 1), value

    def apply(trained: Any, opt_state: Any, acc: Any) -> Any:
        updates, opt_state = base.update(accumulator.finalize(acc), opt_state, trained)
        # And an empty accumulator in the place of the old one.
        empty = accumulator.init(trained)
        return optax.apply_updates(trained, updates), opt_state, empty

    batch = _batch(config, sizes)
    jitted = jax.jit(accumulate, donate_argnums=2)
    micro = jitted.lower(trained, frozen, acc, batch).compile()
    jitted = jax.jit(apply, donate_argnums=(0, 1, 2))
    apply_step = jitted.lower(trained, opt_state, acc).compile()
    frozen_bytes, state_bytes = tree_bytes(frozen), tree_bytes(opt_state)
    return {
        "model": model,
        "method": name,
        "rank": rank,
        "parameters": tree_bytes(trained) + frozen_bytes,
        "trained": tree_bytes(trained),
        "optimizer": state_bytes,
        "accumulator": tree_bytes(acc),
        # What a step does not take lies in memory all the same.
        "accumulate_step": step_bytes(micro) + state_bytes,
        "accumulate_temporaries": micro.memory_analysis().temp_size_in_bytes,
        "apply_step": step_bytes(apply_step) + frozen_bytes,
        "apply_temporaries": apply_step.memory_analysis().temp_size_in_bytes,
    }


def parameters(sizes: Any, method: Method, rank: int | None) -> tuple[Any, Any, Any]:
    """Returns a model's static part, and shapes of trained and frozen parameters."""
    if not method.adapters:
        return *jax.eval_shape(lambda: create(sizes, 0)), {}
    adapted = jax.eval_shape(lambda: lora.add(*create(sizes, 0), rank, rank, 0))
    return adapted[0], *lora.divide(adapted[1], tune_rest=False)


def _full() -> Any:
    return optax.microbatching.Accumulator(
        init=optax.tree.zeros_like,
        update=lambda total, grads, i: optax.tree.add(total, grads),
        finalize=lambda total: optax.tree.scale(1 / _MICRO_BATCHES, total),
        aggregate=lambda value: value,
    )


def _batch(config: Config, sizes: Any) -> dict[str, jax.ShapeDtypeStruct]:
    lengths = {"source": config.source_length, "target": config.target_length}
    if isinstance(sizes, GPT2Config):
        lengths = {"tokens": sum(lengths.values()) + 1}
    rows = config.batch_size
    return {k: jax.ShapeDtypeStruct((rows, n), jnp.int32) for k, n in lengths.items()}
