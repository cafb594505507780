"""GaLore (arXiv 2403.03507) in float64, with every matrix formed."""

import numpy as np

from tests.reference.subspace import chosen, subspace_adam


def galore(
    weights,
    gradients,
    top_svd,
    learning_rate,
    rank,
    refresh_every=200,
    b1=0.9,
    b2=0.999,
    eps=1e-6,
    scale=0.25,
    weight_decay=0.0,
    left=False,
    transport="keep",
):
    """Updates of all steps, as of ``subspace_adam``.

    top_svd: (gradient, rank, left) -> S; the one below, or one with other signs.
    """
    return subspace_adam(
        weights,
        gradients,
        chosen(top_svd, rank, refresh_every, left),
        direction(scale),
        learning_rate,
        b1,
        b2,
        eps,
        weight_decay,
        left,
        transport,
    )


def top_svd(gradient, rank, left):
    """The leading singular vectors of the side that is sketched, as rows of S."""
    u, _, vt = np.linalg.svd(np.asarray(gradient, np.float64), full_matrices=False)
    return u[:, :rank].T if left else vt[:rank]


def direction(scale):
    """α Sᵀ N.

    A direction takes G, S, R, Adam's N, its bias correction and the norm that it gave
    last (at first 0), and gives the step's direction and its norm for the next.
    """
    return lambda g, s, r, n, c, previous: (scale * (s.T @ n), previous)
