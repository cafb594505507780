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
from experiments.step_time.config import Config
from experiments.step_time.contenders import Contender


def run(config: Config) -> None:
    """Times every contender, and compares compile times."""
    steps: list[Row] = []
    content: Row = {"machine": timing.machine(), "steps": steps}
    places = [(tree, dtype) for tree in config.trees for dtype in config.dtypes]
    with Console().status("") as status:
        for i, (tree, dtype) in enumerate(places):
            ranks = config.other_ranks if i else config.ranks
            steps += time_all(config, tree, dtype, ranks, status.update)
        tree = config.compile_tree
        if tree is not None:
            status.update(f"compile times on {tree}")
            content["compile"] = compile_times(tree, contenders.compiled_only())
    path = config.output_dir / f"{config.contenders}.json"
    publish(path, config, content, report.write)


def time_all(
    config: Config,
    tree: str,
    dtype: str,
    ranks: Sequence[int],
    tell: Callable[..., None],
) -> list[Row]:
    """Times every contender on one tree, in one process, in turns.

    Args:
        config: which of our contenders, and how many timed steps of each.
        tree: name of the tree.
        dtype: of parameters and gradients.
        ranks: of our contenders.
        tell: called with a line on the progress.

    Returns:
        One row per contender.
    """
    like = shapes(tree, dtype)
    params, grads = random_like(like, 0), random_like(like, 1)
    floor = 1e3 * _floor_seconds(params, config.rounds)
    shared = {"tree": tree, "dtype": dtype, "floor_milliseconds": floor}
    peers = contenders.peers(config.contenders, tree.endswith("-stacked"), dtype)
    programs: dict[Any, timing.Program] = {}  # Those with the same step share one.
    runners: list[tuple[Contender, timing.Program, list[float]]] = []
    for each in (*peers, *contenders.ours(config.contenders, ranks)):
        tell(f"{tree} {dtype}: compiling {each.name} {each.rank or ''}")
        if each.step not in programs:
            state = jax.jit(each.init)(params)
            programs[each.step] = timing.Program(each.step, params, state, grads)
        runners.append((each, programs[each.step], []))
    rounds = timing.UNTIMED + config.rounds
    for number in range(rounds):
        tell(f"{tree} {dtype}: round {number + 1} of {rounds}")
        for each, program, times in runners:
            if each.once and number != timing.UNTIMED:
                continue
            if each.before is not None:
                program.state = each.before(program.state)
            params, seconds = program.run(params, grads)
            if number >= timing.UNTIMED:
                times.append(seconds)
    return [shared | _row(*runner, like) for runner in runners]


def _row(
    each: Contender, program: timing.Program, times: list[float], like: Params
) -> Row:
    return {
        "name": each.name,
        "kind": each.kind,
        "rank": each.rank,
        **timing.median_and_quartiles(times),
        "steps": len(times),
        "compile_seconds": program.compile_seconds,
        "state_bytes": tree_bytes(jax.eval_shape(each.init, like)),
        "temp_bytes": program.compiled.memory_analysis().temp_size_in_bytes,
    }


def _floor_seconds(params: Any, rounds: int) -> float:
    """Reading gradients and parameters and writing parameters, at a copy's bandwidth.

    The copy negates the parameters in place: one pass of reading, one of writing.
    """

    def copy(tree: Any, state: Any, given: Any) -> Any:
        return jax.tree.map(lambda x: -x, tree), state

    tree = jax.tree.map(lambda x: x + 0, params)
    program = timing.Program(copy, tree, (), ())
    for _ in range(timing.UNTIMED + rounds):
        tree, _ = program.run(tree, ())
    return 1.5 * statistics.median(program.seconds[timing.UNTIMED :])


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
