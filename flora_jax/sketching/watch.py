"""What transformations sketch, seen from outside while their update is traced."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from flora_jax.leaves.plan import LeafPlan


class Sketched(NamedTuple):
    """One leaf of one transformation at one update.

    Attributes:
      sketcher: the transformation's settings.
      plan: the leaf's plan.
      drawn: what fixes S.
      given: the ScaledLeaf that is sketched, G.
      sketch: C, in the state's shape.
      memory: what it goes into, in the state's shape: a momentum, an accumulator, or
        the sketch itself.
      largest: how many times ‖G‖ the norm of a stable memory may be, or None.
    """

    sketcher: Any
    plan: LeafPlan
    drawn: Any
    given: Any
    sketch: Any
    memory: Any
    largest: Any = None


_SEEN: contextvars.ContextVar[list[Sketched] | None] = contextvars.ContextVar(
    "seen", default=None
)


@contextlib.contextmanager
def watching(seen: list[Sketched] | None) -> Iterator[None]:
    """Adds all that is sketched inside of it to a list; None hides it from others."""
    token = _SEEN.set(seen)
    try:
        yield
    finally:
        _SEEN.reset(token)


def note(plan: LeafPlan, describe: Callable[[], Sketched]) -> None:
    """Tells who watches of a leaf, if it is sketched."""
    seen = _SEEN.get()
    if seen is not None and plan.dense_reason is None:
        seen.append(describe())
