"""The matrices that leaves stand for, written out by hand for min_dim_size=8."""

import numpy as np

# Leaf shape, and (batch, rows, columns) of its fold; every fold here is a reshape.
SHAPES = {
    "tall": ((32, 16), (1, 32, 16)),
    "wide": ((16, 24), (1, 16, 24)),
    "square": ((16, 16), (1, 16, 16)),
    "cut": ((16, 4, 8), (1, 16, 32)),
    "stack": ((3, 16, 24), (3, 16, 24)),
}

# Some divide the sketched side and some do not, whichever side that is.
RANKS = {"tall": 4, "wide": 5, "square": 7, "cut": 3, "stack": 8}


def left(name, side):
    """Whether the rows of a leaf's matrix are sketched, S G, or else G Sᵀ."""
    _, n, m = SHAPES[name][1]
    return {"smaller": n < m, "larger": n >= m, "left": True, "right": False}[side]


def width(name, side):
    """Size of the sketched side of a leaf's matrix."""
    _, n, m = SHAPES[name][1]
    return n if left(name, side) else m


def fold(name, leaf):
    """A leaf as a float64 stack of matrices."""
    return np.asarray(leaf, np.float64).reshape(SHAPES[name][1])


def gradients(steps, names=tuple(SHAPES), seed=0):
    """One dict of float32 leaves per step."""
    rng = np.random.default_rng(seed)
    return [
        {name: rng.normal(size=SHAPES[name][0]).astype(np.float32) for name in names}
        for _ in range(steps)
    ]
