"""The basis of a subspace: where it comes from, and when it is renewed."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from flora_jax.random import keys as _keys
from flora_jax.leaves.plan import LeafPlan
from flora_jax.projections import AdaptiveProjection, Projection
from flora_jax.transforms.parts import ScaledLeaf
from flora_jax.sketching.sketcher import Sketcher
from flora_jax.subspace.transports import transport_leaf

_GROUPS = 16  # Of leaves that change their basis at the same step, if staggered.


@dataclasses.dataclass(frozen=True)
class Subspace(Sketcher):
    """A sketcher whose basis may be chosen from the gradient, and is renewed.

    Attributes:
      refresh_every: updates between two bases T; None keeps the first.
      stagger: whether leaves change theirs at different steps.
      transport: what becomes of the moments.
    """

    refresh_every: int | None = None
    stagger: bool = False
    transport: str = "keep"

    accepts: ClassVar[type] = Projection

    @property
    def adaptive(self) -> bool:
        """Whether a basis is stored."""
        return isinstance(self.projection, AdaptiveProjection)

    def plan(self, tree: Any) -> list[LeafPlan]:
        """Plans of all leaves, after checking that each has enough directions."""
        plans = self.rules.plan(tree)
        for plan in plans:
            if self.adaptive and plan.dense_reason is None:
                other = plan.rows if plan.axis == -1 else plan.columns
                found = self.projection.directions(plan.width, other)
                if plan.rank > found:
                    raise ValueError(
                        f"`rank` of leaf {plan.path!r} must be at most {found}, the"
                        f" directions that its {plan.rows}x{plan.columns} fold has, got"
                        f" rank={plan.rank}; lower it or use side='smaller'"
                    )
        return plans

    def stored_shapes(self, plans: Sequence[LeafPlan]) -> list[tuple[int, ...]]:
        """Shapes of the stored bases."""
        sizes = (self.projection.stored_sizes(plan.rank) for plan in plans)
        return [
            plan.resized(sketched, other, plan.ones)
            for plan, (sketched, other) in zip(plans, sizes, strict=True)
        ]

    def shapes(self, plans: Sequence[LeafPlan]) -> dict[str, list[tuple[int, ...]]]:
        """Shapes of what a state may keep beside the inner one, by field."""
        return {
            "basis": self.stored_shapes(plans) if self.adaptive else [],
            "limiter": [plan.resized(1, 1, plan.ones) for plan in plans],
            "error": [x.ones if x.dense_reason else x.shape for x in plans],
        }

    def bases(
        self,
        plans: Sequence[LeafPlan],
        root: jax.Array,
        count: Any,
        stored: Sequence[jax.Array],
    ) -> list[Any]:
        """What fixes S for each leaf at this step; None for dense leaves."""
        offsets = jnp.asarray(self._offsets(plans) if self.stagger else 0, jnp.int32)
        return self._bases(plans, root, self._epoch(count, offsets), stored)

    def _bases(
        self,
        plans: Sequence[LeafPlan],
        root: jax.Array,
        epoch: Any,
        stored: Sequence[jax.Array],
    ) -> list[Any]:
        if not self.adaptive:
            return self.draw(plans, root, epoch)
        return [
            None if plan.dense_reason else self._read(plan, array)
            for plan, array in zip(plans, stored, strict=True)
        ]

    def refresh(
        self,
        plans: Sequence[LeafPlan],
        kinds: Sequence[str],
        grads: Sequence[jax.Array],
        stored: Sequence[jax.Array],
        moments: Sequence[Sequence[jax.Array]],
        root: jax.Array,
        count: Any,
        betas: Any,
    ) -> tuple[list[jax.Array], list[list[jax.Array]]]:
        """Stored bases and moments, renewed where that is due."""
        stored, moments = list(stored), [list(tree) for tree in moments]
        every = self.refresh_every
        if not self.adaptive and (every is None or not moments):
            return stored, moments  # A key's epoch is all there is to renew.
        groups: dict[int, list[int]] = {}
        for i, offset in enumerate(self._offsets(plans)):
            if plans[i].dense_reason is None:
                groups.setdefault(offset, []).append(i)
        for offset, members in groups.items():
            own = [plans[i] for i in members]
            operands = (
                [grads[i] for i in members],
                [stored[i] for i in members] if stored else [],
                [[tree[i] for tree in moments] for i in members],
            )

            new = jax.lax.cond(
                self._due(offset, count),
                functools.partial(self._renew, own, kinds, offset),
                lambda grads, stored, moments, *_: (stored, moments),
                *operands,
                root,
                count,
                betas,
            )
            for place, i in enumerate(members):
                if stored:
                    stored[i] = new[0][place]
                for tree, moment in zip(moments, new[1][place], strict=True):
                    tree[i] = moment
        return stored, moments

    def _renew(
        self,
        plans: Sequence[LeafPlan],
        kinds: Sequence[str],
        offset: int,
        grads: Sequence[jax.Array],
        stored: Sequence[jax.Array],
        moments: Sequence[Sequence[jax.Array]],
        root: jax.Array,
        count: Any,
        betas: Any,
    ) -> tuple[list[jax.Array], list[list[jax.Array]]]:
        """:meth:`refresh` of sketched leaves that are all due."""
        new, epoch = list(stored), self._epoch(count, offset)
        if self.adaptive:
            keys = self.keys(plans, range(len(plans)), root, count)
            new = [
                self._choose(plan, key, grad)
                for plan, key, grad in zip(plans, keys, grads, strict=True)
            ]
        if not kinds:
            return new, [[] for _ in plans]
        fresh: list[Any] = [None] * len(plans)
        if self.transport == "reset":
            drawn = self._bases(plans, root, epoch, new)
            fresh = [
                self.sketch(plan, basis, ScaledLeaf(grad))
                for plan, basis, grad in zip(plans, drawn, grads, strict=True)
            ]
        matrices = (
            [self._transfer(*each) for each in zip(plans, stored, new, strict=True)]
            if self.adaptive
            else self.transfers(plans, root, epoch)
        )
        return new, [
            transport_leaf(self.transport, kinds, *leaf, count, betas)
            for leaf in zip(plans, matrices, moments, fresh, strict=True)
        ]

    def _transfer(self, plan: LeafPlan, old: jax.Array, new: jax.Array) -> jax.Array:
        bases = self._read(plan, old), self._read(plan, new)
        return self.projection.transfer(*bases, plan.rank, plan.width)

    def _choose(self, plan: LeafPlan, key: jax.Array, grad: jax.Array) -> jax.Array:
        matrix = plan.fold(grad.astype(jnp.float32))
        chosen = self.projection.choose(key, matrix, plan.rank, plan.axis)
        return plan.unfold(chosen, self.stored_shapes([plan])[0])

    def _read(self, plan: LeafPlan, stored: jax.Array) -> Any:
        return self.projection.read(plan.fold(stored), plan.axis)

    def _due(self, offset: int, count: Any) -> Any:
        if self.refresh_every is None:
            return count == 0
        due = _keys.renewal(count, self.refresh_every, offset)[1]
        # A basis that is chosen at every step needs no counter for that.
        return due | (count == 0) | (self.refresh_every == 1) if self.adaptive else due

    def _offsets(self, plans: Sequence[LeafPlan]) -> list[int]:
        """By how many steps each leaf is ahead.

        By path, so that a mask does not move the others; and in few groups, since each
        is a branch to compile.
        """
        if not self.stagger or self.refresh_every is None:
            return [0] * len(plans)
        groups = min(self.refresh_every, _GROUPS)
        places = (zlib.crc32(plan.path.encode()) % groups for plan in plans)
        return [place * self.refresh_every // groups for place in places]

    def _epoch(self, count: Any, offset: Any) -> Any:
        """How often a basis was renewed."""
        if self.refresh_every is None:
            return jnp.int32(0)
        return _keys.renewal(count, self.refresh_every, offset)[0]
