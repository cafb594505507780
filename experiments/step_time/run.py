"""Interleaved timings: every contender takes one step, then all of them again."""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import flora_jax as fj
from experiments.common import timing
from experiments.common.methods import METHODS, PROJECTIONS, Settings, built
from experiments.common.records import Row
from experiments.common.report import publish
from experiments.common.state_bytes import tree_bytes
from experiments.models.build import Params, shapes
from experiments.step_time import report
from experiments.step_time.config import Config, Which

Tell = Callable[[str], None]

_NEVER = 10**6  # Micro-steps in a cycle: the last one of a cycle is not timed.
_INTERVAL = 200  # Updates between two projections or bases.
_PEERS = {
    "flora": ("sgd", "adam", "adafactor", "adafactor_momentum", "full_accumulation"),
    "family": ("adamw", "muon", "adam", "adafactor_momentum"),
}
_OF_OPTAX = {
    "adafactor_momentum": "adafactor(momentum)",
    "full_accumulation": "MultiSteps(adafactor)",
    "muon": "contrib.muon",
    "optax_galore": "contrib.galore",
}


@dataclasses.dataclass(frozen=True)
class Contender:
    """A step to time: `step(params, state, grads)` returns new params and state.

    Attributes:
        name: in tables.
        kind: optimizer, micro-step, accumulator or renewal (of projection or basis).
        init: from the parameters to the state.
        step: the step.
        rank: of the sketches, if there are any.
        before: changes the state before each timed step.
        once: takes one step in all, since that takes a minute.
    """

    name: str
    kind: str
    init: Callable[[Any], Any]
    step: Callable[[Any, Any, Any], tuple[Any, Any]]
    rank: int | None = None
    before: Callable[[Any], Any] | None = None
    once: bool = False

    def renewing(self, count: int, *, once: bool = False) -> "Contender":
        """The same step where it is the one that renews projection or basis."""
        before = functools.partial(_counted, count)
        return dataclasses.replace(self, kind="renewal", before=before, once=once)


Contenders = Iterator[Contender]


def _optimizer(
    method: str, rank: int | None = None, name: str = "", **options: Any
) -> Contender:
    own = {"micro_batches": _NEVER, "refresh_every": _INTERVAL, "options": options}
    tx = METHODS[method].optimizer(1e-4, Settings(rank or 1, **own))

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    kind = "micro-step" if METHODS[method].kind == "accumulation" else "optimizer"
    return Contender(name or method, kind, tx.init, step, rank)


def _accumulator(projection: str, rank: int) -> Contender:
    accumulator = fj.compressed_accumulator(fj.Sketch(rank, built(projection)))

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        return params, accumulator.update(state, grads, 1)

    name = f"compressed_accumulator({projection})"
    return Contender(name, "accumulator", accumulator.init, step, rank)


def _counted(number: int, state: Any) -> Any:
    """Sets all counts of a state."""

    def set_count(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        is_count = getattr(path[-1], "name", "") == "count"
        return jnp.full([], number, leaf.dtype) if is_count else leaf

    return jax.tree_util.tree_map_with_path(set_count, state)


def _peer(method: str, rank: int | None = None) -> Contender:
    return _optimizer(method, rank, f"optax.{_OF_OPTAX.get(method, method)}")


def peers(which: Which, stacked: bool, dtype: str) -> Contenders:
    """What optax offers, at its own defaults."""
    yield from map(_peer, _PEERS[which])
    if not stacked and dtype == "float32":  # It takes neither 3-D leaves nor bfloat16.
        yield _peer("optax_galore", 64)


def ours(which: Which, ranks: Sequence[int]) -> Contenders:
    """Returns FLORA, or the family, at all ranks."""
    if which == "family":
        yield from _both("apollo_mini", 1)
    for rank in ranks:
        yield from {"flora": _flora, "family": _family}[which](rank)


def _flora(rank: int) -> Contenders:
    """FLORA with each projection, the accumulations with the two that matter."""
    for name in PROJECTIONS:
        flora = _optimizer("flora", rank, f"flora({name})", projection=name)
        yield flora
        if name in PROJECTIONS[:2]:
            title = f"compressed_accumulation({name})"
            yield _optimizer("flora_accumulation", rank, title, projection=name)
            yield _accumulator(name, rank)
            # The momentum moves at the end of the update that completes an interval.
            yield flora.renewing(_INTERVAL - 1)


def _family(rank: int) -> Contenders:
    """Each recipe without a new basis, and with new ones for all matrices at once."""
    exact = {"projection": fj.TopSVD(method="exact")}
    int8 = {"state_dtype": "int8"}
    yield from _both("galore(exact)", rank, once=True, **exact)
    yield from _both("galore(randomized)", rank)
    yield from _both("galore(randomized, int8)", rank, **int8)
    yield from _both("fira(randomized)", rank)
    yield from _both("apollo", rank)
    yield from _both("dct_adamw(refresh_every=200)", rank, refresh_every=_INTERVAL)
    yield from _both("flora_adamw", rank)
    yield from _both("flora_adamw(int8)", rank, **int8)
    yield _optimizer("dct_adamw", rank)
    name = "flora_adamw(orthogonal=True)"
    yield _optimizer("flora_adamw", rank, name, orthogonal=True)
    yield _optimizer("flora", rank)


def _both(name: str, rank: int, *, once: bool = False, **options: Any) -> Contenders:
    """A step in the basis of the first, untimed step; one that renews all bases."""
    step = _optimizer(name.partition("(")[0], rank, name, **options)
    yield step
    yield step.renewing(_INTERVAL, once=once)


def compiled_only(rank: int = 64) -> Contenders:
    """Those whose compile times are compared."""
    yield from map(_peer, ("adafactor", "adafactor_momentum"))
    for name in PROJECTIONS[:2]:
        yield _optimizer("flora", rank, f"flora({name})", projection=name)
    yield _optimizer("flora_adamw", rank)
    yield _optimizer("flora_adamw", rank, "flora_adamw(int8)", state_dtype="int8")
    yield _optimizer("galore", rank, "galore(randomized)")


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
            content["compile"] = compile_times(tree, compiled_only())
    path = config.output_dir / f"{config.contenders}.json"
    publish(path, config, content, report.write)


def time_all(
    config: Config, tree: str, dtype: str, ranks: Sequence[int], tell: Tell
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
    everyone = peers(config.contenders, tree.endswith("-stacked"), dtype)
    programs: dict[Any, timing.Program] = {}  # Those with the same step share one.
    runners: list[tuple[Contender, timing.Program, list[float]]] = []
    for each in (*everyone, *ours(config.contenders, ranks)):
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
    rows = []
    for each, program, times in runners:
        row = shared | _about(each, program) | timing.median_and_quartiles(times)
        size = tree_bytes(jax.eval_shape(each.init, like))
        rows.append(row | {"kind": each.kind, "steps": len(times), "state_bytes": size})
    return rows


def _about(each: Contender, program: timing.Program) -> Row:
    """What every row says."""
    temporaries = program.compiled.memory_analysis().temp_size_in_bytes
    row = {"name": each.name, "rank": each.rank, "temp_bytes": temporaries}
    return row | {"compile_seconds": program.compile_seconds}


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
        row = {"tree": tree, "trace_seconds": program.trace_seconds}
        rows.append(row | _about(contender, program))
    return rows


def random_like(tree: Params, seed: int) -> Params:
    """Returns normal numbers of standard deviation 0.02 in the shapes of a tree."""
    generator = np.random.default_rng(seed)

    def sample(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        numbers = generator.standard_normal(leaf.shape, np.float32)
        return jnp.asarray(0.02 * numbers, leaf.dtype)

    return jax.tree.map(sample, tree)
