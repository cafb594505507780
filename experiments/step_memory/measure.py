"""The compiler's account of an accumulate step and an apply step.

Model, gradient, accumulator and optimizer are those of a training, lowered on shapes
and compiled with the buffers donated that a training donates; nothing is allocated. The
two are programs of their own, since in one without donation the outputs would hide the
accumulator. FLORA sketches every matrix of an aspect ratio up to 16, as in the paper;
the trainings here leave position embeddings out as well.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

import flora_jax as fj
from experiments.common import lora
from experiments.common.state_bytes import step_bytes, tree_bytes
from experiments.models import PUBLISHED, GPT2Config, abstract, create, mean_loss
from experiments.step_memory.config import Config

_RATE, _MICRO_BATCHES = 1e-3, 16


@dataclasses.dataclass(frozen=True)
class Row:
    """Bytes of one method on one model."""

    model: str
    method: str
    rank: int | None
    parameters: int
    trained: int
    """Those of the parameters that are trained."""
    optimizer: int
    accumulator: int
    accumulate_step: int
    """Arguments + outputs + temporaries - aliases."""
    accumulate_temporaries: int
    apply_step: int
    apply_temporaries: int


def measure(config: Config, name: str, method: str, rank: int | None) -> Row:
    """Compiles both steps of one method and adds up their bytes."""
    model = dataclasses.replace(
        PUBLISHED[name],
        dtype=config.dtype,
        remat=config.remat,
        scan=config.scan,
        dropout=0.0,
    )
    graphdef, trained, frozen = _parameters(model, method, rank)
    base = optax.adam(_RATE) if method == "adam" else optax.adafactor(_RATE)
    accumulator = _accumulator(config, method, rank)
    value_and_grad: Any = jax.value_and_grad
    if method == "sketched":
        value_and_grad = functools.partial(
            fj.sketched_value_and_grad, **_sketch(config, rank)
        )
    acc = jax.eval_shape(accumulator.init, trained)
    opt_state = jax.eval_shape(base.init, trained)

    def accumulate(trained: Any, frozen: Any, acc: Any, batch: Any) -> Any:
        def loss(trained: Any) -> jax.Array:
            return mean_loss(graphdef, lora.join(trained, frozen), batch)

        value, grads = value_and_grad(loss)(trained)
        return accumulator.update(acc, grads, 1), value

    def apply(trained: Any, opt_state: Any, acc: Any) -> Any:
        grads = accumulator.finalize(acc)
        updates, opt_state = base.update(grads, opt_state, trained)
        # And an empty accumulator in the place of the old one.
        return (
            optax.apply_updates(trained, updates),
            opt_state,
            accumulator.init(trained),
        )

    batch = _batch(config, model)
    micro = _compile(accumulate, (2,), trained, frozen, acc, batch)
    whole = _compile(apply, (0, 1, 2), trained, opt_state, acc)
    frozen_bytes = tree_bytes(frozen)
    return Row(
        model=name,
        method=method,
        rank=rank,
        parameters=tree_bytes(trained) + frozen_bytes,
        trained=tree_bytes(trained),
        optimizer=tree_bytes(opt_state),
        accumulator=tree_bytes(acc),
        # What a step does not take lies in memory all the same.
        accumulate_step=step_bytes(micro) + tree_bytes(opt_state),
        accumulate_temporaries=_temporaries(micro),
        apply_step=step_bytes(whole) + frozen_bytes,
        apply_temporaries=_temporaries(whole),
    )


def _parameters(model: Any, method: str, rank: int | None) -> tuple[Any, Any, Any]:
    """The model's static part, and shapes of its trained and frozen parameters."""
    if method != "lora":
        return *abstract(lambda: create(model, 0)), {}
    graphdef, params = abstract(lambda: lora.add(*create(model, 0), rank, rank, 0))
    return graphdef, *lora.divide(params, tune_rest=False)


def _accumulator(config: Config, method: str, rank: int | None) -> Any:
    if method in ("flora", "sketched"):
        return fj.compressed_accumulator(**_sketch(config, rank))
    return optax.microbatching.Accumulator(
        init=optax.tree.zeros_like,
        update=lambda total, grads, i: optax.tree.add(total, grads),
        finalize=lambda total: optax.tree.scale(1 / _MICRO_BATCHES, total),
        aggregate=lambda value: value,
    )


def _sketch(config: Config, rank: int | None) -> dict[str, Any]:
    return {"rank": rank, "key": 0, "projection": getattr(fj, config.projection)()}


def _batch(config: Config, model: Any) -> dict[str, jax.ShapeDtypeStruct]:
    def tokens(length: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((config.batch_size, length), jnp.int32)

    if isinstance(model, GPT2Config):
        return {"tokens": tokens(config.source_length + config.target_length + 1)}
    return {
        "source": tokens(config.source_length),
        "target": tokens(config.target_length),
    }


def _compile(
    function: Any, donated: tuple[int, ...], *arguments: Any
) -> jax.stages.Compiled:
    return jax.jit(function, donate_argnums=donated).lower(*arguments).compile()


def _temporaries(compiled: jax.stages.Compiled) -> int:
    return compiled.memory_analysis().temp_size_in_bytes
