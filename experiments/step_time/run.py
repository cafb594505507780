"""Interleaved timings: every contender takes one step, then all of them again."""

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from experiments.common import timing
from experiments.common.records import Row
from experiments.common.report import publish
from experiments.common.state_bytes import tree_bytes
from experiments.models.build import Params, create
from experiments.models.config import PUBLISHED
from experiments.step_time import contenders, report
from experiments.step_time.config import Config, Which
from experiments.step_time.contenders import Contender


def run(config: Config) -> None:
    """Times every contender, and compares compile times."""
    steps: list[Row] = []
    content: Row = {"machine": timing.machine(), "steps": steps}
    places = [(tree, dtype) for tree in config.trees for dtype in config.dtypes]
    with Console().status("") as status:
        for i, (tree, dtype) in enumerate(places):
            ranks = config.other_ranks if i else config.ranks
            steps += time_all(
                tree, dtype, ranks, config.rounds, status.update, config.contenders
            )
        if config.compile_tree is not None:
            status.update(f"compile times on {config.compile_tree}")
            content["compile"] = compile_times(
                config.compile_tree, contenders.compiled_only()
            )
    path = config.output_dir / f"{config.contenders}.json"
    publish(path, config, content, report.write)


class _Runner:
    """One contender and its times; those with the same step share a program."""

    def __init__(self, contender: Contender, program: timing.Program):
        self.contender, self.program = contender, program
        self.seconds: list[float] = []

    def run(self, grads: Any, params: Any, timed: bool) -> Any:
        if self.contender.before is not None:
            self.program.state = self.contender.before(self.program.state)
        params, seconds = self.program.run(params, grads)
        if timed:
            self.seconds.append(seconds)
        return params

    def row(self, params: Any) -> Row:
        memory = self.program.compiled.memory_analysis()
        return {
            "name": self.contender.name,
            "kind": self.contender.kind,
            "rank": self.contender.rank,
            **timing.median_and_quartiles(self.seconds),
            "steps": len(self.seconds),
            "compile_seconds": self.program.compile_seconds,
            "state_bytes": tree_bytes(jax.eval_shape(self.contender.init, params)),
            "temp_bytes": memory.temp_size_in_bytes,
        }


def time_all(
    tree: str,
    dtype: str,
    ranks: Sequence[int],
    rounds: int,
    tell: Callable[[str], None],
    which: Which = "flora",
) -> list[Row]:
    """Times every contender on one tree, in one process, in turns.

    Args:
        tree: name of the tree.
        dtype: of parameters and gradients.
        ranks: of our contenders.
        rounds: timed steps of each.
        tell: called with a line on the progress.
        which: of our contenders.

    Returns:
        One row per contender.
    """
    like = shapes(tree, dtype)
    params, grads = random_like(like, 0), random_like(like, 1)
    floor = 1e3 * _floor_seconds(params, rounds)
    stacked = tree.endswith("-stacked")
    runners, programs = [], {}
    for contender in (
        *contenders.peers(which, stacked, dtype),
        *contenders.ours(which, ranks),
    ):
        tell(f"{tree} {dtype}: compiling {contender.name} {contender.rank or ''}")
        if contender.step not in programs:
            state = jax.jit(contender.init)(params)
            program = timing.Program(contender.step, params, state, grads)
            programs[contender.step] = program
        runners.append(_Runner(contender, programs[contender.step]))
    for number in range(timing.UNTIMED + rounds):
        tell(f"{tree} {dtype}: round {number + 1} of {timing.UNTIMED + rounds}")
        for runner in runners:
            if not runner.contender.once or number == timing.UNTIMED:
                params = runner.run(grads, params, number >= timing.UNTIMED)
    rows = [runner.row(params) for runner in runners]
    shared = {"tree": tree, "dtype": dtype, "floor_milliseconds": floor}
    return [shared | row for row in rows]


def _floor_seconds(params: Any, rounds: int) -> float:
    """Reading gradients and parameters and writing parameters, at a copy's bandwidth.

    The copy negates the parameters in place: one pass of reading, one of writing.
    """

    def copy(tree: Any, state: Any, given: Any) -> Any:
        return jax.tree.map(lambda x: -x, tree), state

    tree = jax.tree.map(lambda x: x + 0, params)
    program, seconds = timing.Program(copy, tree, (), ()), []
    for _ in range(timing.UNTIMED + rounds):
        tree, taken = program.run(tree, ())
        seconds.append(taken)
    return 1.5 * statistics.median(seconds[timing.UNTIMED :])


def compile_times(tree: str, all_of: Iterable[Contender]) -> list[Row]:
    """Times tracing and compilation on a tree of any size; nothing is allocated."""
    params = shapes(tree, "float32")
    rows = []
    for contender in all_of:
        state = jax.eval_shape(contender.init, params)
        program = timing.Program(contender.step, params, state, params)
        rows.append(
            {
                "tree": tree,
                "name": contender.name,
                "rank": contender.rank,
                "trace_seconds": program.trace_seconds,
                "compile_seconds": program.compile_seconds,
                "temp_bytes": program.compiled.memory_analysis().temp_size_in_bytes,
            }
        )
    return rows


def shapes(name: str, dtype: str) -> Params:
    """Returns a tree of ShapeDtypeStructs.

    Args:
        name: of a published size, with -stacked for one array per weight of all layers.
        dtype: of every leaf.
    """
    size = name.removesuffix("-stacked")
    config = dataclasses.replace(PUBLISHED[size], scan=name != size)
    params = jax.eval_shape(lambda: create(config, 0)[1])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), params
    )


def random_like(tree: Params, seed: int) -> Params:
    """Returns normal numbers of standard deviation 0.02 in the shapes of a tree."""
    generator = np.random.default_rng(seed)

    def sample(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        numbers = generator.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(0.02 * numbers, leaf.dtype)

    return jax.tree.map(sample, tree)
