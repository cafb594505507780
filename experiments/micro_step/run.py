"""Compiles and times micro-steps: with full gradients, and with sketched ones."""

import collections
import dataclasses
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track

import flora_jax as fj
from experiments.common import gradients, records, timing
from experiments.common.methods import METHODS, Settings, built, matrices
from experiments.common.report import publish
from experiments.micro_step import report
from experiments.micro_step.config import Config
from experiments.models.build import create, mean_loss
from experiments.models.config import PUBLISHED, GPT2Config, T5Config

_VOCABULARY = 257  # So that embedding and head are next to nothing beside a block.
_CYCLE = 1000  # Micro-steps; none of those that are timed is the last of one.


def run(config: Config) -> None:
    """Measures every model and writes data, table and picture."""
    rows = [row for name in config.models for row in measure(config, name)]
    content = {"machine": timing.machine(), "rows": rows}
    path = config.output_dir / "micro_step.json"
    publish(path, config, content, report.write)


class Contender(NamedTuple):
    """A way to a micro-step."""

    method: str
    projection: str | None = None
    rank: int | None = None


def contenders(config: Config) -> list[Contender]:
    """Full gradients in full accumulators, in sketches, and sketches of none."""
    ours = [
        Contender(name, projection, rank)
        for name in ("flora_accumulation", "sketched_accumulation")
        for projection in config.projections
        for rank in config.ranks
    ]
    return [Contender("full_accumulation"), *ours]


def problem(config: Config, name: str) -> tuple[gradients.Loss, Any, Any]:
    """Returns a loss, parameters of some blocks, and a batch of random tokens."""
    size = PUBLISHED[name]
    changes: dict[str, Any] = {
        "layers": config.blocks,
        "vocab_size": _VOCABULARY,
        "dropout": 0.0,
        "dtype": config.dtype,
    }
    if isinstance(size, T5Config):
        changes["decoder_layers"] = config.blocks
    graphdef, params = create(dataclasses.replace(size, **changes), 0)
    sample = functools.partial(np.random.default_rng(1).integers, 1, _VOCABULARY)
    lengths = {"source": config.length, "target": config.length}
    if isinstance(size, GPT2Config):
        lengths = {"tokens": config.length + 1}
    batch = {
        field: jnp.asarray(sample((config.batch_size, length)), jnp.int32)
        for field, length in lengths.items()
    }

    def loss(params: Any, frozen: Any, batch: Any, key: jax.Array) -> jax.Array:
        del frozen, key
        return mean_loss(graphdef, params, batch)

    return loss, params, batch


class _Runner(timing.Program):
    """The compiled programs of a contender, and its times."""

    def __init__(
        self, contender: Contender, loss: gradients.Loss, params: Any, batch: Any
    ):
        self.contender, method = contender, METHODS[contender.method]
        projection = built(contender.projection)
        sketch = fj.Sketch(contender.rank or 1, projection, mask=fj.not_embeddings)
        tx = method.optimizer(1e-3, Settings(sketch, micro_batches=_CYCLE))
        gradient_of = gradients.of(method, sketch)

        def gradient(params: Any, state: Any, batch: Any) -> Any:
            value_and_grad = gradient_of(loss, state)
            value, grads = value_and_grad(params, {}, batch, jax.random.key(0))
            return value, jax.tree.leaves(grads)

        def step(params: Any, state: Any, batch: Any) -> Any:
            value_and_grad = gradient_of(loss, state)
            _, grads = value_and_grad(params, {}, batch, jax.random.key(0))
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.seconds: list[float] = []
        state = jax.jit(tx.init)(params)
        super().__init__(step, params, state, batch)
        self.gradient = jax.jit(gradient).lower(params, state, batch).compile()

    def row(self, shapes: set[tuple[int, ...]]) -> records.Row:
        memory = self.gradient.memory_analysis()
        analysis: Any = self.gradient.cost_analysis()
        return self.contender._asdict() | {
            "flops": analysis["flops"],
            "gradient_output_bytes": memory.output_size_in_bytes,
            "gradient_temp_bytes": memory.temp_size_in_bytes,
            "weight_shaped_buffers": buffers(self.gradient.as_text(), shapes),
            **timing.median_and_quartiles(self.seconds),
        }


def measure(config: Config, name: str) -> list[records.Row]:
    """Times every contender on one model: rows, with ratios to the first one."""
    loss, params, batch = problem(config, name)
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(matrices(params)), strict=True)
    shapes = {leaf.shape for leaf, own in pairs if own}
    runners = [
        _Runner(contender, loss, params, batch)
        for contender in track(contenders(config), f"compiling {name}")
    ]
    for number in track(range(timing.UNTIMED + config.rounds), f"timing {name}"):
        for runner in runners:
            params, seconds = runner.run(params, batch)
            if number >= timing.UNTIMED:
                runner.seconds.append(seconds)
    rows = [{"model": name} | runner.row(shapes) for runner in runners]
    return [
        row | {f"{x}_ratio": row[x] / rows[0][x] for x in ("flops", "milliseconds")}
        for row in rows
    ]


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
