"""Fira (arXiv 2410.01623), and Fira on a regenerated basis, in float64."""

import numpy as np

from tests.reference.subspace import (
    chosen,
    limited,
    regenerated,
    subspace_adam,
)


def fira(
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
    whole=False,
    residual="paper",
    gamma=1.01,
):
    """Updates of all steps, as of ``subspace_adam``.

    top_svd: as of ``galore``. whole, residual, gamma: as of ``direction``.
    """
    return subspace_adam(
        weights,
        gradients,
        chosen(top_svd, rank, refresh_every, left),
        direction(scale, whole, residual, gamma),
        learning_rate,
        b1,
        b2,
        eps,
        weight_decay,
        left,
        transport,
    )


def flora_adamw(
    weights,
    gradients,
    projection,
    learning_rate,
    refresh_every,
    transport,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    left=False,
    whole=False,
    gamma=1.01,
    last=None,
):
    """Updates of all steps, as of ``subspace_adam``.

    projection: epoch -> S with orthonormal rows, shared by all matrices. last: what is
    done to each direction, before weight decay and learning rate; None for nothing.
    """
    made = direction(1.0, whole, "paper", gamma, 1 / 8)

    def with_last(*arguments):
        d, previous = made(*arguments)
        return last(d), previous

    return subspace_adam(
        weights,
        gradients,
        regenerated(projection, refresh_every),
        made if last is None else with_last,
        learning_rate,
        b1,
        b2,
        eps,
        weight_decay,
        left,
        transport,
    )


def direction(scale, whole=False, residual="paper", gamma=1.01, least=0.0):
    """c (α Sᵀ ψ + X), ψ = N / c; see ``galore.direction``.

    whole: one φ for a matrix, not one per column. residual: G - Sᵀ R of the "paper", or
    G - α Sᵀ R of the published "code". gamma: of the limiter. least: what part of
    √(r/m) ‖G_j‖ the norm of R_j is at least taken for.
    """
    share = {"paper": 1.0, "code": scale}[residual]

    def fira_direction(g, s, r, n, c, previous):
        psi = n / c
        axis = None if whole else 0
        seen = np.sqrt(s.shape[0] / s.shape[1]) * np.linalg.norm(g, axis=axis)
        seen = np.maximum(np.linalg.norm(r, axis=axis), least * seen)
        phi = np.linalg.norm(psi, axis=axis) / (seen + 1e-8)
        x, previous = limited(phi * (g - share * (s.T @ r)), previous, gamma)
        return c * (scale * (s.T @ psi) + x), previous

    return fira_direction
