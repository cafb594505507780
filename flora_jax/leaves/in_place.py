"""Updates that are added to the parameters where they are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from flora_jax._typing import PyTree

APPLY = "flora_jax_apply"  # The extra argument of update that is InPlace.


class InPlace:
    """Asks a transformation to apply its updates, and stands for them afterwards.

    Not a pytree: a transformation that would go on to change the updates raises.

    Attributes:
      transform: from some scalars, an update and a parameter to the update that is
        added; or from the same part of both, as it changes each element by itself.
      scalars: those of each leaf, in flattening order; None if there are none.
      params: the new parameters; None until a transformation has set them.
      is_required: whether the two calls of optax would not do in place of this one.
    """

    params: PyTree = None
    is_required: bool = False

    def __init__(
        self,
        transform: Callable[[Any, jax.Array, jax.Array], jax.Array] | None = None,
        scalars: Sequence[Any] | None = None,
    ) -> None:
        """Keeps what is done to each update before it is added."""
        self.transform = transform
        self.scalars = scalars

    def apply(self, scalars: Any, update: jax.Array, param: jax.Array) -> jax.Array:
        """The new parameter, or the same part of it."""
        if self.transform is not None:
            update = self.transform(scalars, update, param)
        return (param + update).astype(param.dtype)
