"""Updates that are added to the parameters where they are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from flora_jax._typing import KeyData, PyTree
from flora_jax.leaves.rounding import Rounding, add_update, leaf_roundings

APPLY = "flora_jax_apply"  # The extra argument of update that is InPlace.


class InPlace:
    """Asks a transformation to apply its updates, and stands for them afterwards.

    Not a pytree: a transformation that would go on to change the updates raises.

    Attributes:
      given: the parameters to add to; of others, such as a wrapper's copies, nothing is
        to be applied.
      transform: from some scalars, an update and a parameter to the update that is
        added; or from the same part of both, as it changes each element by itself.
      scalars: those of each leaf, in flattening order.
      key: key data for the rounding of bfloat16 parameters; None to round to nearest.
      expanded: the gradients that were expanded from sketches, and for each what it was
        expanded from; None if there are none.
      for_recipes: whether recipes are to apply theirs, too, or an accumulation alone.
      is_required: whether the two calls of optax would not do in place of this one.
      params: the new parameters; None until a transformation has set them.
    """

    is_required: bool = False
    params: PyTree = None
    expanded: tuple[Sequence[jax.Array], Sequence[Any]] | None = None

    def __init__(
        self,
        given: PyTree,
        transform: Callable[[Any, jax.Array, jax.Array], Any] | None = None,
        scalars: Sequence[Any] | None = None,
        for_recipes: bool = True,
        key: KeyData | None = None,
    ) -> None:
        """Keeps what is done to each update before it is added."""
        self.given = given
        self.transform = transform
        self.scalars = scalars or len(jax.tree.leaves(given)) * [()]
        self.for_recipes = for_recipes
        self.key = key

    def is_for(self, params: PyTree) -> bool:
        """Whether these are the parameters to add to, and not others in their place."""
        ours, theirs = jax.tree.leaves(self.given), jax.tree.leaves(params)
        same = len(ours) == len(theirs)
        return same and all(x is y for x, y in zip(ours, theirs, strict=True))

    def sources(self, grads: Sequence[jax.Array]) -> Sequence[Any]:
        """What each of these gradients was expanded from, or None."""
        ours, sources = self.expanded or ((), ())
        same = len(ours) == len(grads)
        same = same and all(x is y for x, y in zip(ours, grads, strict=True))
        return sources if same else [None] * len(grads)

    def is_for_recipe(self, params: PyTree) -> bool:
        """Whether a recipe that is given these parameters is to apply its updates."""
        return self.for_recipes and self.is_for(params)

    def arguments(self) -> list[tuple[Any, Rounding | None]]:
        """Scalars and rounding of each leaf, the first argument of :meth:`apply`.

        Arrays of the leaf's number of axes and scalars: a loop slices them with it.
        """
        roundings = leaf_roundings(self.key, self.given)
        return list(zip(self.scalars, roundings, strict=True))

    def apply(
        self,
        arguments: tuple[Any, Rounding | None],
        update: jax.Array,
        param: jax.Array,
    ) -> jax.Array:
        """The new parameter, or the same part of it."""
        scalars, rounding = arguments
        if self.transform is not None:
            update = self.transform(scalars, update, param)
        return add_update(param, update, rounding)
