"""One choice of the arguments of scale_in_subspace, and what its oracle gives."""

import dataclasses
import zlib
from typing import Any

import numpy as np
import optax

import flora_jax as fj
from tests.reference import apollo, fira, folds, galore
from tests.reference.subspace import subspace_adam
from tests.subspace.bases import basis_of

ALL = tuple(folds.SHAPES)
B1, B2, EPS, SEED, EVERY, STEPS = 0.8, 0.9, 1e-3, 11, 4, 10
COUNTSKETCH = fj.CountSketch(normalization="isometric")
UNLIMITED = 1e30


# By how many of 4 steps staggered leaves are ahead: crc32 modulo 16, over 4.
OFFSETS = {name: zlib.crc32(name.encode()) % 16 // 4 for name in ALL}
RULES = {
    fj.Keep: "keep",
    fj.Squared: "squared",
    fj.LDAdam: "ldadam",
    fj.PreserveRMS: "rms",
    fj.Reset: "reset",
}
DECAYS = {"b1": B1, "b2": B2}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Arguments of scale_in_subspace, and the leaves it is given."""

    projection: fj.Projection
    names: tuple = ALL
    every: int | None = EVERY
    side: str = "smaller"
    transport: Any = fj.Keep()
    residual: Any = None
    scale: float = 1.0
    stagger: bool = False

    def __str__(self):
        parts = (self.projection, self.transport, self.residual)
        kinds = [type(x).__name__ for x in parts]
        norms = getattr(self.residual, "norms", "")
        return "-".join([*kinds, norms, self.side, *self.names])

    def make(self, **changes):
        sketch = fj.Sketch(
            {name: folds.RANKS[name] for name in self.names},
            self.projection,
            key=SEED,
            side=self.side,
            min_dim_size=8,
        )
        fields = "transport", "residual", "scale", "stagger"
        rest = {name: getattr(self, name) for name in fields}
        inner = optax.scale_by_adam(B1, B2, EPS)
        return fj.scale_in_subspace(inner, sketch, self.every, **{**rest, **changes})

    def direction(self):
        """What the oracle makes of Adam's output."""
        residual = self.residual
        whole = getattr(residual, "norms", None) == "tensor"
        gamma = getattr(residual, "limiter", None) or UNLIMITED
        least = 1 / 8 if isinstance(self.projection, fj.ObliviousProjection) else 0.0
        made = {
            type(None): galore.direction(self.scale),
            fj.Plain: lambda g, s, r, n, c, previous: (
                self.scale * s.T @ n + (g - s.T @ r),
                previous,
            ),
            fj.Fira: fira.direction(self.scale, whole, "paper", gamma, least),
            fj.FiraCode: fira.direction(self.scale, whole, "code", gamma, least),
            # APOLLO's own scale stands under a root.
            fj.Apollo: apollo.direction(self.scale**2, whole, gamma),
        }[type(residual)]
        if getattr(residual, "b1", None) is not None:
            return made
        return lambda g, s, r, n, c, previous: made(g, s, r, n, 1.0, previous)

    def offset(self, name):
        """By how many steps a leaf is ahead of the first."""
        return OFFSETS[name] if self.stagger else 0

    def expected(self, name, gradients):
        """The oracle's updates of one leaf."""
        left = folds.left(name, self.side)
        basis = basis_of(
            self.projection, SEED, name, self.side, self.every, self.offset(name)
        )
        return subspace_adam(
            folds.fold(name, np.zeros(folds.SHAPES[name][0])),
            [folds.fold(name, g[name]) for g in gradients],
            basis,
            self.direction(),
            lambda t: -1.0,
            B1,
            B2,
            EPS,
            left=left,
            transport=RULES[type(self.transport)],
        )


def gradients_of(names, steps=STEPS):
    """Of uneven sizes, so that the limiter has something to do.

    Their singular values are apart: float32 mixes the vectors of near ones.
    """
    sizes = [1.0, 0.3, 4.0, 1.0, 2.0]

    def leaf(name, x, t):
        u, s, vt = np.linalg.svd(folds.fold(name, x), full_matrices=False)
        matrix = (u * (4 * sizes[t % 5] * 0.8 ** np.arange(s.shape[-1]))) @ vt
        return np.float32(matrix.reshape(x.shape))

    return [
        {name: leaf(name, x, t) for name, x in g.items()}
        for t, g in enumerate(folds.gradients(steps, names))
    ]
