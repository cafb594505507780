"""Compiles and times micro-steps: with full gradients, and with sketched ones."""

import collections
import dataclasses
import functools
import itertools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track

import flora_jax as fj
from experiments.common import records, timing
from experiments.common.methods import METHODS, Loss, Settings, built, matrices
from experiments.common.report import publish
from experiments.micro_step import report
from experiments.micro_step.config import Config
from experiments.models.build import create, mean_loss
from experiments.models.config import PUBLISHED, T5Config

_VOCABULARY = 257  # So that embedding and head are small compared with a block.
_CYCLE = 1000  # Micro-steps; none of those that are timed is the last of one.


def run(config: Config) -> None:
    """Measures every model and writes data, table and picture."""
    rows = [row for name in config.models for row in measure(config, name)]
    path = config.output_dir / "micro_step.json"
    publish(path, config, {"machine": timing.machine(), "rows": rows}, report.write)


class Contender(NamedTuple):
    """A way to a micro-step."""

    method: str
    projection: str | None = None
    rank: int | None = None


def contenders(config: Config) -> list[Contender]:
    """Full gradients in full accumulators, in sketches, and sketches of none."""
    names = ("flora_accumulation", "sketched_accumulation")
    ours = itertools.product(names, config.projections, config.ranks)
    return [Contender("full_accumulation"), *itertools.starmap(Contender, ours)]


def problem(config: Config, name: str) -> tuple[Loss, Any, Any]:
    """Returns a loss, parameters of some blocks, and a batch of random tokens."""
    changes = {"layers": config.blocks, "dtype": config.dtype, "dropout": 0.0}
    lengths = {"tokens": config.length + 1}
    if isinstance(PUBLISHED[name], T5Config):
        changes["decoder_layers"] = config.blocks
        lengths = {"source": config.length, "target": config.length}
    size = dataclasses.replace(PUBLISHED[name], vocab_size=_VOCABULARY, **changes)
    graphdef, params = create(size, 0)
    sample = functools.partial(np.random.default_rng(1).integers, 1, _VOCABULARY)
    batch = {
        field: jnp.asarray(sample((config.batch_size, length)), jnp.int32)
        for field, length in lengths.items()
    }
    return functools.partial(mean_loss, graphdef), params, batch


def compiled(
    contender: Contender, loss: Loss, params: Any, batch: Any
) -> tuple[timing.Program, jax.stages.Compiled]:
    """Returns a contender's micro-step, and its gradient function alone."""
    method = METHODS[contender.method]
    projection = built(contender.projection)
    sketch = fj.Sketch(contender.rank or 1, projection, mask=fj.not_embeddings)
    tx = method.optimizer(1e-3, Settings(sketch, micro_batches=_CYCLE))
    value_and_grad = functools.partial(method.value_and_grad, loss, sketch)

    def gradient(params: Any, state: Any, batch: Any) -> Any:
        value, grads = value_and_grad(state, params, batch)
        return value, jax.tree.leaves(grads)

    def step(params: Any, state: Any, batch: Any) -> Any:
        _, grads = value_and_grad(state, params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    alone = jax.jit(gradient).lower(params, state, batch).compile()
    return timing.Program(step, params, state, batch), alone


def measure(config: Config, name: str) -> list[records.Row]:
    """Times every contender on one model: rows, with ratios to the first one."""
    loss, params, batch = problem(config, name)
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(matrices(params)), strict=True)
    shapes = {leaf.shape for leaf, own in pairs if own}
    runners = [
        (each, *compiled(each, loss, params, batch))
        for each in track(contenders(config), f"compiling {name}")
    ]
    for _ in track(range(timing.UNTIMED + config.rounds), f"timing {name}"):
        for _, program, _ in runners:
            params, _ = program.run(params, batch)
    rows = []
    for each, program, gradient in runners:
        memory, analysis = gradient.memory_analysis(), gradient.cost_analysis()
        row = {"model": name, **each._asdict(), "flops": analysis["flops"]}
        row["gradient_output_bytes"] = memory.output_size_in_bytes
        row["gradient_temp_bytes"] = memory.temp_size_in_bytes
        row["weight_shaped_buffers"] = buffers(gradient.as_text(), shapes)
        row |= timing.median_and_quartiles(program.seconds[timing.UNTIMED :])
        rows.append(row)
        row |= {f"{x}_ratio": row[x] / rows[0][x] for x in ("flops", "milliseconds")}
    return rows


_INSTRUCTION = re.compile(r" = (.*?) ([a-z][\w-]*)\(")
_SHAPE = re.compile(r"\b(?:f|bf)\d+\[([\d,]+)\]")
_NO_BUFFERS = ("parameter", "bitcast", "get-tuple-element", "tuple")


def buffers(text: str, shapes: set[tuple[int, ...]]) -> dict[str, int]:
    """Counts instructions whose results have one of some shapes.

    Args:
        text: a compiled program. Fused instructions count, though they have no buffer.
        shapes: of weights; the sides of a matrix in either order, leading and trailing
            sides of 1 aside.

    Returns:
        How many there are by opcode; arguments and views of them aside.
    """
    wanted = {tuple(sorted(shape)) for shape in shapes}
    found: collections.Counter[str] = collections.Counter()
    for kind, opcode in _INSTRUCTION.findall(text):
        if opcode in _NO_BUFFERS:
            continue
        for sizes in _SHAPE.findall(kind):
            shape = tuple(n for n in map(int, sizes.split(",")) if n != 1)
            found[opcode] += tuple(sorted(shape)) in wanted
    return {opcode: count for opcode, count in sorted(found.items()) if count}
