"""The basis of a subspace: where it comes from, and when it is replaced."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flora_jax._typing import PyTree, Shape
from flora_jax._xla import renewed_if, unstacked
from flora_jax.leaves.layers import by_layers
from flora_jax.leaves.plan import LeafPlan
from flora_jax.projections.base import AdaptiveProjection
from flora_jax.random.keys import leaf_keys, renewal
from flora_jax.sketching.sketcher import ScaledLeaf, Sketcher
from flora_jax.subspace.transports import BasisChange, Moments, Transport

_GROUPS = 16  # Of leaves that change their basis at the same step, if staggered.


class Refresh(NamedTuple):
    """What a replacement of bases depends on; all of it may be traced.

    Attributes:
      transport: how moments move.
      key: the state's root key.
      count: updates so far.
    """

    transport: Transport
    key: jax.Array
    count: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Basis:
    """Projections that a key or a gradient determines, replaced every T steps.

    Attributes:
      sketcher: the settings of the sketches.
      refresh_every: T, an int or traced; None keeps the first basis.
      stagger: whether leaves change theirs at different steps.
    """

    sketcher: Sketcher
    refresh_every: Any
    stagger: bool

    @functools.cached_property
    def is_stored(self) -> bool:
        """Whether bases are chosen and stored, and not regenerated from a key."""
        return isinstance(self.sketcher.projection, AdaptiveProjection)

    def plan(self, tree: PyTree) -> tuple[LeafPlan, ...]:
        """Plans of all leaves, after checking that each has enough directions."""
        plans = self.sketcher.plan(tree)
        for plan in plans:
            if plan.dense or not self.is_stored:
                continue
            other = plan.rows if plan.axis == -1 else plan.columns
            found = self.sketcher.projection.directions(plan.width, other)
            if plan.rank > found:
                raise ValueError(
                    f"`rank` of leaf {plan.path!r} must be at most {found}, the"
                    f" directions that its {plan.rows}x{plan.columns} fold has, got"
                    f" rank={plan.rank}; lower it or use side='smaller'"
                )
        return plans

    def stored_shape(self, plan: LeafPlan) -> Shape:
        """Shape of a leaf's stored basis."""
        sketched, other = self.sketcher.projection.stored_sizes(plan.rank)
        return plan.resized(sketched, other, plan.ones)

    def renew(
        self,
        plans: Sequence[LeafPlan],
        grads: Sequence[jax.Array],
        stored: Sequence[Any],
        moments: Sequence[list[Moments]],
        refresh: Refresh,
    ) -> tuple[list[Any], list[Any], list[list[Moments]]]:
        """Replaces bases where that is due, and moves the moments along.

        Args:
          plans: plans of all leaves.
          grads: G of each leaf.
          stored: each leaf's stored basis, or None.
          moments: for each leaf those of each NamedTuple of the inner state.
          refresh: key, count and transport.

        Returns:
          What determines S for each leaf at this step, stored bases, and moments.
        """
        sampled: list[Any] = [None] * len(plans)
        stored, moments = list(stored), list(moments)
        if not self.is_stored:
            epochs = self._epochs(plans, refresh.count)
            sampled = self.sketcher.sample(plans, refresh.key, epochs)
            if self.refresh_every is None or not refresh.transport.moves:
                return sampled, stored, moments
        sketched = [(i, plan) for i, plan in enumerate(plans) if not plan.dense]
        places = {i: self._place(plan) for i, plan in sketched}
        for place in dict.fromkeys(places.values()):
            members = [i for i, own in places.items() if own == place]
            offset = self._offset(place)
            renew = functools.partial(
                self._renewed,
                [plans[i] for i in members],
                offset,
                [(grads[i], sampled[i]) for i in members],
                refresh,
            )
            due = self._is_due(offset, refresh.count)
            old = [(stored[i], moments[i]) for i in members]
            if self.is_stored:  # Out of a loop XLA would move what reads gradients.
                choose = functools.partial(renew, 0)
                renewed = jax.lax.cond(due, choose, lambda same: same, old)
            else:
                renewed = renewed_if(due, renew, old)
            for i, new in zip(members, renewed, strict=True):
                stored[i], moments[i] = new
        if self.is_stored:
            sampled = self._read(plans, stored)
        return sampled, stored, moments

    def _renewed(
        self,
        plans: Sequence[LeafPlan],
        offset: Any,
        leaves: Sequence[tuple[Any, Any]],
        refresh: Refresh,
        index: jax.typing.ArrayLike,
        old: Sequence[tuple[Any, list[Moments]]],
    ) -> list[tuple[Any, list[Moments]]]:
        """New bases and moments of sketched leaves that are all due."""
        grads, sampled = zip(*leaves, strict=True)
        stored, moments = zip(*old, strict=True)
        transport, key, count = refresh
        count = count + index
        new = stored
        if self.is_stored:
            paths = [plan.path for plan in plans]
            keys = unstacked(leaf_keys(key, self.sketcher.name, paths, count))
            new = list(map(self._choose, plans, keys, grads))
        if not transport.moves:
            return list(zip(new, moments, strict=True))
        if self.is_stored:
            old, sampled = self._read(plans, stored), self._read(plans, new)
            matrices = [
                self.sketcher.projection.transfer(a, b, plan.rank, plan.width)
                for plan, a, b in zip(plans, old, sampled, strict=True)
            ]
        else:
            epoch, _ = renewal(count, self.refresh_every, offset)
            back = self.sketcher.transfers(plans, sampled, key, epoch - 1)
            matrices = [matrix.swapaxes(-1, -2) for matrix in back]
        moved = []
        for i, plan in enumerate(plans):
            fresh = None
            if transport.needs_sketch:
                given = ScaledLeaf(grads[i])
                fresh = self.sketcher.sketch_leaf(plan, sampled[i], given)
            change = BasisChange(plan, matrices[i], fresh, count)
            moved.append([_moved(transport, change, group) for group in moments[i]])
        return list(zip(new, moved, strict=True))

    def _choose(self, plan: LeafPlan, key: jax.Array, grad: jax.Array) -> jax.Array:
        choose = self.sketcher.projection.choose

        def layers(plan: LeafPlan, grad: jax.Array, *_: None) -> tuple[None, jax.Array]:
            matrix = plan.fold(grad)
            chosen = choose(key, matrix, plan.rank, plan.axis)
            return None, plan.unfold(chosen, self.stored_shape(plan))

        return by_layers(layers, plan, grad)[1]

    def _read(self, plans: Sequence[LeafPlan], stored: Sequence[Any]) -> list[Any]:
        read = self.sketcher.projection.from_stored
        return [
            None if plan.dense else read(plan.fold(x), plan.axis)
            for plan, x in zip(plans, stored, strict=True)
        ]

    def _epochs(self, plans: Sequence[LeafPlan], count: Any) -> Any:
        """How often bases were replaced: one number, or one for each leaf."""
        if self.refresh_every is None:
            return jnp.uint32(0)
        offsets: Any = 0
        if self.stagger:
            places = jnp.asarray([self._place(plan) for plan in plans], jnp.int32)
            offsets = self._offset(places)
        return renewal(count, self.refresh_every, offsets)[0]

    def _is_due(self, offset: Any, count: Any) -> Any:
        if self.refresh_every is None:
            return count == 0
        _, due = renewal(count, self.refresh_every, offset)
        if not self.is_stored:
            return due
        # A basis that is chosen at every step needs no counter for that.
        return due | (count == 0) | (self.refresh_every == 1)

    def _place(self, plan: LeafPlan) -> int:
        """Which group of staggered leaves a leaf is in.

        By path, so that a mask does not move the others; and in few groups, since each
        is a branch or a loop to compile.
        """
        if not self.stagger or self.refresh_every is None:
            return 0
        return zlib.crc32(plan.key_path.encode()) % _GROUPS

    def _offset(self, place: Any) -> Any:
        """By how many steps a group is ahead: T·place/16, without overflow."""
        if self.refresh_every is None:
            return 0
        full, rest = self.refresh_every // _GROUPS, self.refresh_every % _GROUPS
        return place * full + place * rest // _GROUPS


def _moved(transport: Transport, change: BasisChange, moments: Moments) -> Moments:
    """One NamedTuple's moments of a leaf in the new basis, in their dtypes."""
    wide = {name: x.astype(jnp.float32) for name, x in moments.items()}
    moved = transport.move(change, wide)
    return {name: moved[name].astype(x.dtype) for name, x in moments.items()}
