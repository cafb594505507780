"""Interleaved timings: every contender takes one step, then all of them again."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from experiments.step_time import contenders, trees
from experiments.step_time.config import Which
from experiments.step_time.contenders import Contender

_UNTIMED = 2
Row = dict[str, Any]


class _Program:
    """A step, compiled, and the state that it goes on with."""

    def __init__(self, contender: Contender, grads: Any, params: Any):
        self.state = jax.jit(contender.init)(params)
        started = time.perf_counter()
        # In place of the old ones, as in a training step.
        step = jax.jit(contender.step, donate_argnums=(0, 1))
        self.compiled = step.lower(params, self.state, grads).compile()
        self.compile_seconds = time.perf_counter() - started


class _Runner:
    """One contender and its times; those with the same step share a program."""

    def __init__(self, contender: Contender, program: _Program):
        self.contender, self.program = contender, program
        self.seconds: list[float] = []

    def run(self, grads: Any, params: Any, timed: bool) -> Any:
        program = self.program
        if self.contender.before is not None:
            program.state = self.contender.before(program.state)
        jax.block_until_ready((program.state, params))
        started = time.perf_counter()
        params, program.state = program.compiled(params, program.state, grads)
        jax.block_until_ready((program.state, params))
        if timed:
            self.seconds.append(time.perf_counter() - started)
        return params

    def row(self, params: Any) -> Row:
        return {
            "name": self.contender.name,
            "kind": self.contender.kind,
            "rank": self.contender.rank,
            "milliseconds": 1e3 * statistics.median(self.seconds),
            "quartiles": [1e3 * q for q in _quartiles(self.seconds)],
            "steps": len(self.seconds),
            "compile_seconds": self.program.compile_seconds,
            "state_bytes": contenders.state_bytes(self.contender, params),
            "temp_bytes": self.program.compiled.memory_analysis().temp_size_in_bytes,
        }


def _quartiles(seconds: Sequence[float]) -> tuple[float, float]:
    if len(seconds) < 2:
        return seconds[0], seconds[0]
    first, _, last = statistics.quantiles(seconds, n=4)
    return first, last


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
        One row per contender, with its time over Adam's (and AdamW's, if that is a
        peer), over its own step without a new basis, and over the floor.
    """
    like = trees.shapes(tree, dtype)
    params, grads = trees.random_like(like, 0), trees.random_like(like, 1)
    floor = _floor_seconds(params, rounds)
    stacked = tree.endswith("-stacked")
    runners, programs = [], {}
    peers, ours = {
        "flora": (contenders.peers, contenders.ours),
        "family": (contenders.family_peers, contenders.family),
    }[which]
    for contender in (*peers(stacked, dtype), *ours(ranks)):
        tell(f"{tree} {dtype}: compiling {contender.name} {contender.rank or ''}")
        if contender.step not in programs:
            programs[contender.step] = _Program(contender, grads, params)
        runners.append(_Runner(contender, programs[contender.step]))
    for number in range(_UNTIMED + rounds):
        tell(f"{tree} {dtype}: round {number + 1} of {_UNTIMED + rounds}")
        for runner in runners:
            if not runner.contender.once or number == _UNTIMED:
                params = runner.run(grads, params, number >= _UNTIMED)
    rows = [runner.row(params) for runner in runners]
    return [
        {"tree": tree, "dtype": dtype}
        | row
        | _ratios(row, rows)
        | {
            "floor_milliseconds": 1e3 * floor,
            "over_floor": row["milliseconds"] / (1e3 * floor),
        }
        for row in rows
    ]


def _ratios(row: Row, rows: Sequence[Row]) -> Row:
    """Times over those that they are compared with, where these are there."""
    compared = {
        "over_adam": ("optax.adam", "optimizer", None),
        "over_adamw": ("optax.adamw", "optimizer", None),
    }
    if row["kind"] == "refresh":
        compared["over_step"] = (row["name"], "optimizer", row["rank"])
    times = {(r["name"], r["kind"], r["rank"]): r["milliseconds"] for r in rows}
    return {
        name: row["milliseconds"] / times[key]
        for name, key in compared.items()
        if key in times
    }


def _floor_seconds(params: Any, rounds: int) -> float:
    """Reading gradients and parameters and writing parameters, at a copy's bandwidth.

    The copy negates the parameters in place: one pass of reading, one of writing.
    """
    copy = jax.jit(lambda tree: jax.tree.map(lambda x: -x, tree), donate_argnums=0)
    tree = jax.tree.map(lambda x: x + 0, params)
    seconds = []
    for _ in range(_UNTIMED + rounds):
        started = time.perf_counter()
        tree = jax.block_until_ready(copy(tree))
        seconds.append(time.perf_counter() - started)
    return 1.5 * statistics.median(seconds[_UNTIMED:])


def compile_times(tree: str, all_of: Iterable[Contender]) -> list[Row]:
    """Times tracing and compilation on a tree of any size; nothing is allocated."""
    params = trees.shapes(tree, "float32")
    rows = []
    for contender in all_of:
        state = jax.eval_shape(contender.init, params)
        started = time.perf_counter()
        lowered = jax.jit(contender.step, donate_argnums=(0, 1)).lower(
            params, state, params
        )
        traced = time.perf_counter()
        compiled = lowered.compile()
        rows.append(
            {
                "tree": tree,
                "name": contender.name,
                "rank": contender.rank,
                "trace_seconds": traced - started,
                "compile_seconds": time.perf_counter() - traced,
                "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
            }
        )
    return rows
