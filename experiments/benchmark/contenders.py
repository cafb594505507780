"""The optimizers that are compared, each as one function of gradients and state."""

import dataclasses
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
    """optimizer, micro-step, accumulator or resampling."""
    init: Callable[[Any], Any]
    step: Callable[[Any, Any, Any], tuple[Any, Any]]
    rank: int | None = None
    before: Callable[[Any], Any] | None = None
    """Changes the state before each timed step."""


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


def _resampling(state: Any) -> Any:
    def set_count(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        is_count = getattr(path[-1], "name", "") == "count"
        return jnp.full([], 1000, leaf.dtype) if is_count else leaf

    return jax.tree_util.tree_map_with_path(set_count, state)


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
            tx = fj.flora(_RATE, rank, projection=projection)
            yield _optimizer(f"flora({_name(projection)})", tx, rank=rank)
        for projection in PROJECTIONS[:2]:
            tx = fj.compressed_accumulation(
                optax.adafactor(_RATE), _NEVER, rank, projection=projection
            )
            name = f"compressed_accumulation({_name(projection)})"
            yield _optimizer(name, tx, "micro-step", rank=rank)
            yield _accumulator(projection, rank)
            tx = fj.flora(_RATE, rank, projection=projection)
            yield _optimizer(
                f"flora({_name(projection)})",
                tx,
                "resampling",
                rank=rank,
                before=_resampling,
            )


def compiled_only(rank: int = 64) -> Iterator[Contender]:
    """Those whose compile times are compared."""
    yield _optimizer("optax.adafactor", optax.adafactor(_RATE))
    yield _optimizer("optax.adafactor(momentum)", optax.adafactor(_RATE, momentum=0.9))
    for projection in PROJECTIONS[:2]:
        tx = fj.flora(_RATE, rank, projection=projection)
        yield _optimizer(f"flora({_name(projection)})", tx, rank=rank)


def state_bytes(contender: Contender, params: Any) -> int:
    """Bytes of a contender's state; nothing is allocated."""
    state = jax.eval_shape(contender.init, params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
