"""APOLLO and APOLLO-Mini (arXiv 2412.05270) in float64, with every matrix formed."""

import numpy as np

from tests.reference.subspace import limited, regenerated, scaling, subspace_adam


def apollo(
    weights,
    gradients,
    projection,
    learning_rate,
    refresh_every=200,
    b1=0.9,
    b2=0.999,
    eps=1e-6,
    scale=1.0,
    weight_decay=0.0,
    left=False,
    whole=False,
    gamma=1.01,
    transport="keep",
):
    """Updates of all steps, as of ``subspace_adam``.

    projection: epoch -> S with entries of N(0, 1/r), shared by all matrices. whole: one
    factor for a matrix, not one per column; so APOLLO-Mini, with rank 1 and scale 128.
    """
    return subspace_adam(
        weights,
        gradients,
        regenerated(projection, refresh_every),
        direction(scale, whole, gamma),
        learning_rate,
        b1,
        b2,
        eps,
        weight_decay,
        left,
        transport,
    )


def direction(scale, whole=False, gamma=1.01):
    """c √α ‖ψ‖ / ‖R‖ G, limited before c, ψ = N / c; see ``galore.direction``.

    As in Fira, whose limiter it is: the growth of bias correction is not limited.
    """

    def apollo_direction(g, s, r, n, c, previous):
        x = np.sqrt(scale) * scaling(n / c, r, whole) * g
        x, previous = limited(x, previous, gamma)
        return c * x, previous

    return apollo_direction
