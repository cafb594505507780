"""The optimizers that are compared, each as one function of gradients and state."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import flora_jax as fj

_RATE = 1e-4
_NEVER = 10**6  # micro-steps per cycle: the last one of a cycle is not timed
PROJECTIONS = (
    fj.CountSketch(),
    fj.Gaussian(),
    fj.Rademacher(),
    fj.SRHT(),
    fj.Orthogonal(),
)


@dataclasses.dataclass(frozen=True)
class Contender:
    """A step to time: `step(params, state, grads)` returns new params and state.

    In this order: JAX gives a donated argument to the first result of its shape, and
    would otherwise put the new parameters where the old moments are, with a copy.
    """

    name: str
    kind: str
    """optimizer, micro-step, accumulator, resampling or refresh."""
    init: Callable[[Any], Any]
    step: Callable[[Any, Any, Any], tuple[Any, Any]]
    rank: int | None = None
    before: Callable[[Any], Any] | None = None
    """Changes the state before each timed step."""
    once: bool = False
    """Takes one step in all, since that takes a minute."""


def _optimizer(
    name: str, tx: optax.GradientTransformation, kind: str = "optimizer", **rest: Any
) -> Contender:
    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Contender(name, kind, tx.init, step, **rest)


def _accumulator(projection: fj.Projection, rank: int) -> Contender:
    accumulator = fj.compressed_accumulator(rank, key=0, projection=projection)

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        return params, accumulator.update(state, grads, 1)

    name = f"compressed_accumulator({_name(projection)})"
    return Contender(name, "accumulator", accumulator.init, step, rank)


def _name(projection: fj.Projection) -> str:
    return type(projection).__name__


def _counted(number: int, state: Any) -> Any:
    """Sets all counts of a state."""

    def set_count(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        is_count = getattr(path[-1], "name", "") == "count"
        return jnp.full([], number, leaf.dtype) if is_count else leaf

    return jax.tree_util.tree_map_with_path(set_count, state)


_resampling = functools.partial(_counted, 1000)  # A multiple of all our intervals.


def peers(stacked: bool, dtype: str) -> Iterator[Contender]:
    """What optax offers, at its own defaults."""
    yield _optimizer("optax.sgd", optax.sgd(_RATE))
    yield _optimizer("optax.adam", optax.adam(_RATE))
    yield _optimizer("optax.adafactor", optax.adafactor(_RATE))
    yield _optimizer("optax.adafactor(momentum)", optax.adafactor(_RATE, momentum=0.9))
    multi = optax.MultiSteps(optax.adafactor(_RATE), _NEVER)
    yield _optimizer(
        "optax.MultiSteps(adafactor)", multi.gradient_transformation(), "micro-step"
    )
    if not stacked and dtype == "float32":  # It takes neither 3-D leaves nor bfloat16.
        galore = optax.contrib.galore(_RATE, rank=64, update_proj_gap=_NEVER)
        yield _optimizer("optax.contrib.galore", galore, rank=64)


def ours(ranks: Sequence[int]) -> Iterator[Contender]:
    """FLORA with each projection, the accumulations with the two that matter."""
    for rank in ranks:
        for projection in PROJECTIONS:
            tx = fj.flora(_RATE, rank, reading="paper", projection=projection)
            yield _optimizer(f"flora({_name(projection)})", tx, rank=rank)
        for projection in PROJECTIONS[:2]:
            tx = fj.compressed_accumulation(
                optax.adafactor(_RATE), _NEVER, rank, projection=projection
            )
            name = f"compressed_accumulation({_name(projection)})"
            yield _optimizer(name, tx, "micro-step", rank=rank)
            yield _accumulator(projection, rank)
            tx = fj.flora(_RATE, rank, reading="paper", projection=projection)
            yield _optimizer(
                f"flora({_name(projection)})",
                tx,
                "resampling",
                rank=rank,
                before=_resampling,
            )


def _muon_axes(params: Any) -> Any:
    """Muon for the matrices that ours sketch; the embeddings get its Adam."""
    return jax.tree.map(
        lambda plan: (
            None
            if plan.dense_reason
            else optax.contrib.MuonDimensionNumbers(plan.row_axes, plan.column_axes)
        ),
        fj.plan_leaves(params, 1),
        is_leaf=lambda node: isinstance(node, fj.LeafPlan),
    )


def family_peers(stacked: bool, dtype: str) -> Iterator[Contender]:
    """What optax offers beside the family, at its own defaults."""
    yield _optimizer("optax.adamw", optax.adamw(_RATE))
    muon = optax.contrib.muon(_RATE, muon_weight_dimension_numbers=_muon_axes)
    yield _optimizer("optax.contrib.muon", muon)
    wanted = ("optax.adam", "optax.adafactor(momentum)", "optax.contrib.galore")
    yield from (each for each in peers(stacked, dtype) if each.name in wanted)


def family(ranks: Sequence[int]) -> Iterator[Contender]:
    """Each recipe without a new basis, and with new ones for all matrices at once."""
    randomized, plain = fj.TopSVD(method="randomized"), {"orthogonal": False}
    yield from _both("apollo_mini", fj.apollo_mini(_RATE), 1)
    for rank in ranks:
        yield from _both("galore(exact)", fj.galore(_RATE, rank), rank, slow=True)
        for name, recipe, settings in (
            ("galore(randomized)", fj.galore, {"projection": randomized}),
            (
                "galore(randomized, int8)",
                fj.galore,
                {"projection": randomized, "state_dtype": "int8"},
            ),
            ("fira(randomized)", fj.fira, {"projection": randomized}),
            ("apollo", fj.apollo, {}),
            ("dct_adamw(refresh_every=200)", fj.dct_adamw, {"refresh_every": 200}),
            ("flora_adamw(orthogonal=False)", fj.flora_adamw, plain),
            (
                "flora_adamw(orthogonal=False, int8)",
                fj.flora_adamw,
                plain | {"state_dtype": "int8"},
            ),
        ):
            yield from _both(name, recipe(_RATE, rank, **settings), rank)
        yield _optimizer("dct_adamw", fj.dct_adamw(_RATE, rank), rank=rank)
        yield _optimizer("flora_adamw", fj.flora_adamw(_RATE, rank), rank=rank)
        yield _optimizer("flora", fj.flora(_RATE, rank), rank=rank)


def _both(
    name: str, tx: optax.GradientTransformation, rank: int, *, slow: bool = False
) -> Iterator[Contender]:
    """A step in the basis of the first, untimed step; one that renews all bases."""
    step = _optimizer(name, tx, rank=rank)
    yield step
    yield dataclasses.replace(step, kind="refresh", before=_resampling, once=slow)


def compiled_only(rank: int = 64) -> Iterator[Contender]:
    """Those whose compile times are compared."""
    yield _optimizer("optax.adafactor", optax.adafactor(_RATE))
    yield _optimizer("optax.adafactor(momentum)", optax.adafactor(_RATE, momentum=0.9))
    for projection in PROJECTIONS[:2]:
        tx = fj.flora(_RATE, rank, reading="paper", projection=projection)
        yield _optimizer(f"flora({_name(projection)})", tx, rank=rank)


def state_bytes(contender: Contender, params: Any) -> int:
    """Bytes of a contender's state; nothing is allocated."""
    state = jax.eval_shape(contender.init, params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
