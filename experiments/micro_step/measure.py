"""Compiles and times micro-steps: with full gradients, and with sketched ones."""

import collections
import dataclasses
import functools
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track

import flora_jax as fj
from experiments.common import records
from experiments.common.optimizers import matrices_only
from experiments.micro_step import report
from experiments.micro_step.config import Config
from experiments.models import PUBLISHED, GPT2Config, T5Config, create, mean_loss
from experiments.step_time.run import machine

_VOCABULARY = 257  # So that embedding and head are next to nothing beside a block.
_CYCLE = 1000  # Micro-steps; none of those that are timed is the last of one.
_UNTIMED = 2


@dataclasses.dataclass(frozen=True)
class Problem:
    """A loss, its parameters and a batch."""

    loss: Callable[[Any, Any], jax.Array]
    params: Any
    batch: Any


def problem(config: Config, name: str) -> Problem:
    """Builds blocks of a published size and a batch of random tokens for them."""
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
    draw = functools.partial(np.random.default_rng(1).integers, 1, _VOCABULARY)
    lengths = {"source": config.length, "target": config.length}
    if isinstance(size, GPT2Config):
        lengths = {"tokens": config.length + 1}
    batch = {
        field: jnp.asarray(draw((config.batch_size, length)), jnp.int32)
        for field, length in lengths.items()
    }
    return Problem(lambda p, batch: mean_loss(graphdef, p, batch), params, batch)


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to a micro-step.

    Attributes:
        name: "multi_steps", "flora" or "sketched".
        projection: of the latter two.
        rank: likewise.
    """

    name: str
    projection: str | None = None
    rank: int | None = None

    @property
    def rules(self) -> dict[str, Any]:
        """How leaves are sketched."""
        assert self.projection is not None
        projection = getattr(fj, self.projection)()
        return {"rank": self.rank, "projection": projection, "mask": matrices_only}

    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        """Adafactor behind an accumulator."""
        inner = optax.adafactor(1e-3)
        if self.name == "multi_steps":
            return optax.MultiSteps(inner, _CYCLE).gradient_transformation()
        return fj.compressed_accumulation(inner, _CYCLE, key=0, **self.rules)

    def value_and_grad(self, loss: Any, state: Any) -> Any:
        """The gradient function, in full or of sketches."""
        if self.name != "sketched":
            return jax.value_and_grad(loss)
        return fj.sketched_value_and_grad(
            loss, key=state.key, step=state.gradient_step, **self.rules
        )


def contenders(config: Config) -> list[Contender]:
    """Full gradients in full accumulators, in sketches, and sketches of none."""
    ours = [
        Contender(name, projection, rank)
        for name in ("flora", "sketched")
        for projection in config.projections
        for rank in config.ranks
    ]
    return [Contender("multi_steps"), *ours]


class _Runner:
    """The compiled programs of a contender, and its times."""

    def __init__(self, contender: Contender, given: Problem):
        self.contender = contender
        tx = contender.optimizer()
        self.state: Any = jax.jit(tx.init)(given.params)

        def gradient(params: Any, state: Any, batch: Any) -> Any:
            value, grads = contender.value_and_grad(given.loss, state)(params, batch)
            return value, jax.tree.leaves(grads)

        def step(params: Any, state: Any, batch: Any) -> Any:
            value, grads = contender.value_and_grad(given.loss, state)(params, batch)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        arguments = given.params, self.state, given.batch
        self.gradient = jax.jit(gradient).lower(*arguments).compile()
        jitted = jax.jit(step, donate_argnums=(0, 1))
        self.step = jitted.lower(*arguments).compile()
        self.seconds: list[float] = []

    def run(self, params: Any, batch: Any, timed: bool) -> Any:
        jax.block_until_ready((params, self.state))
        started = time.perf_counter()
        params, self.state, value = self.step(params, self.state, batch)
        jax.block_until_ready((params, self.state, value))
        if timed:
            self.seconds.append(time.perf_counter() - started)
        return params

    def row(self, shapes: set[tuple[int, ...]]) -> dict[str, Any]:
        first, _, last = statistics.quantiles(self.seconds, n=4)
        memory = self.gradient.memory_analysis()
        return {
            "method": self.contender.name,
            "projection": self.contender.projection,
            "rank": self.contender.rank,
            "flops": _flops(self.gradient),
            "gradient_output_bytes": memory.output_size_in_bytes,
            "gradient_temp_bytes": memory.temp_size_in_bytes,
            "weight_shaped_buffers": buffers(self.gradient.as_text(), shapes),
            "milliseconds": 1e3 * statistics.median(self.seconds),
            "quartiles": [1e3 * first, 1e3 * last],
        }


def _flops(compiled: jax.stages.Compiled) -> float:
    analysis: Any = compiled.cost_analysis()
    return analysis["flops"]


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


def measure(config: Config, name: str) -> list[dict[str, Any]]:
    """Times every contender on one model: rows, with ratios to the first one."""
    given = problem(config, name)
    plans = fj.plan_leaves(given.params, 1, mask=matrices_only)
    leaves = jax.tree.leaves(plans, is_leaf=lambda x: isinstance(x, fj.LeafPlan))
    shapes = {plan.shape for plan in leaves if plan.dense_reason is None}
    runners = [
        _Runner(contender, given)
        for contender in track(contenders(config), f"compiling {name}")
    ]
    params = given.params
    for number in track(range(_UNTIMED + config.rounds), f"timing {name}"):
        for runner in runners:
            params = runner.run(params, given.batch, number >= _UNTIMED)
    rows = [{"model": name} | runner.row(shapes) for runner in runners]
    return [
        row | {f"{field}_ratio": row[field] / rows[0][field] for field in _COMPARED}
        for row in rows
    ]


_COMPARED = ("flops", "milliseconds")


def run(config: Config) -> None:
    """Measures every model and writes data, table and picture."""
    rows: list[dict[str, Any]] = []
    for name in config.model:
        rows += measure(config, name)
    folder = config.output_dir
    content = {
        "config": dataclasses.asdict(config) | {"output_dir": str(folder)},
        "machine": machine(),
        "rows": rows,
    }
    records.write_json(folder / "micro_step.json", content)
    text = report.table(rows)
    (folder / "micro_step.md").write_text(text)
    report.draw(rows, content["machine"], folder / "micro_step.png")
    print(text, end="")
    print(f"Table, picture and data are in {folder}")
