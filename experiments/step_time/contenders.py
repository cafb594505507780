"""The optimizers that are compared, each as one function of gradients and state."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import flora_jax as fj
from experiments.common.methods import METHODS, PROJECTIONS, Settings
from experiments.step_time.config import Which

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
    sketch = fj.Sketch(rank, getattr(fj, projection)())
    accumulator = fj.compressed_accumulator(sketch)

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


def peers(which: Which, stacked: bool, dtype: str) -> Iterator[Contender]:
    """What optax offers, at its own defaults."""
    yield from map(_peer, _PEERS[which])
    if not stacked and dtype == "float32":  # It takes neither 3-D leaves nor bfloat16.
        yield _peer("optax_galore", 64)


def ours(which: Which, ranks: Sequence[int]) -> Iterator[Contender]:
    """Returns FLORA, or the family, at all ranks."""
    if which == "family":
        yield from _both("apollo_mini", 1)
    for rank in ranks:
        yield from {"flora": _flora, "family": _family}[which](rank)


def _flora(rank: int) -> Iterator[Contender]:
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


def _family(rank: int) -> Iterator[Contender]:
    """Each recipe without a new basis, and with new ones for all matrices at once."""
    randomized = {"projection": fj.TopSVD(method="randomized")}
    int8 = {"state_dtype": "int8"}
    yield from _both("galore(exact)", rank, once=True)
    yield from _both("galore(randomized)", rank, **randomized)
    yield from _both("galore(randomized, int8)", rank, **randomized, **int8)
    yield from _both("fira(randomized)", rank, **randomized)
    yield from _both("apollo", rank)
    yield from _both("dct_adamw(refresh_every=200)", rank, refresh_every=_INTERVAL)
    yield from _both("flora_adamw", rank)
    yield from _both("flora_adamw(int8)", rank, **int8)
    yield _optimizer("dct_adamw", rank)
    name = "flora_adamw(orthogonal=True)"
    yield _optimizer("flora_adamw", rank, name, orthogonal=True)
    yield _optimizer("flora", rank)


def _both(
    name: str, rank: int, *, once: bool = False, **options: Any
) -> Iterator[Contender]:
    """A step in the basis of the first, untimed step; one that renews all bases."""
    step = _optimizer(name.partition("(")[0], rank, name, **options)
    yield step
    yield step.renewing(_INTERVAL, once=once)


def compiled_only(rank: int = 64) -> Iterator[Contender]:
    """Those whose compile times are compared."""
    yield from map(_peer, ("adafactor", "adafactor_momentum"))
    for name in PROJECTIONS[:2]:
        yield _optimizer("flora", rank, f"flora({name})", projection=name)
