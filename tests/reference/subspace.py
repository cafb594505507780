"""Adam on sketched gradients in float64, with every matrix formed.

Written for R = S G, S of r x width; if not ``left``, it runs on the transposes, which
is R = G Sᵀ. An index that is kept is then a column of R.
"""

import numpy as np

from tests.reference.transport import transported


def subspace_adam(
    weights,
    gradients,
    basis,
    direction,
    learning_rate,
    b1,
    b2,
    eps,
    weight_decay=0.0,
    left=False,
    transport="keep",
):
    """Updates of all steps; each is added to the weights before the next.

    weights: a stack of matrices, each on its own. gradients: one such stack per step.
    basis: (step, matrix) -> a new S, or None to keep the last. direction: what becomes
    of Adam's output, as of ``galore.direction``. learning_rate: step -> number.
    transport: a rule of ``transport.RULES``.
    """

    def one_matrix(w, matrices):
        x, previous, updates = np.asarray(w, np.float64), 0.0, []
        for t, gradient in enumerate(matrices):
            gradient = np.asarray(gradient, np.float64)
            g = gradient if left else gradient.T
            fresh = basis(t, gradient)
            if t == 0:
                s = fresh
                m = v = np.zeros_like(s @ g)
            elif fresh is not None:
                s, c = fresh, fresh @ s.T
                m, v = transported(transport, c, m, v, b1, b2, t, s.shape[1], s @ g)
            r = s @ g
            m, v, n = adam(m, v, r, b1, b2, eps, t + 1)
            d, previous = direction(g, s, r, n, correction(b1, b2, t + 1), previous)
            updates.append(step(d if left else d.T, x, learning_rate(t), weight_decay))
            x = x + updates[-1]
        return updates

    return per_matrix(one_matrix, weights, gradients)


def per_matrix(one_matrix, weights, gradients):
    """Stacks what ``one_matrix`` gives for the weights and gradients of each matrix."""
    series = zip(*gradients, strict=True)
    slices = [one_matrix(*pair) for pair in zip(weights, series, strict=True)]
    return [np.stack(updates) for updates in zip(*slices, strict=True)]


def adam(m, v, r, b1, b2, eps, t):
    """Both moments after the update number t, from 1, and the direction N."""
    m = b1 * m + (1 - b1) * r
    v = b2 * v + (1 - b2) * r**2
    return m, v, (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)


def correction(b1, b2, t):
    """The factor by which bias correction changes Adam's direction (eps aside)."""
    return np.sqrt(1 - b2**t) / (1 - b1**t)


def step(direction, weights, learning_rate, weight_decay):
    """The update, with decoupled weight decay (arXiv 1711.05101)."""
    return -learning_rate * (direction + weight_decay * weights)


def begins(t, every):
    """Whether an interval begins with this step; every: None for one interval."""
    return t % every == 0 if every else t == 0


def regenerated(projection, every):
    """The basis of ``subspace_adam`` from a function of the epoch, epoch -> S."""

    def basis(t, gradient):
        epoch = t // every if every else 0
        return projection(epoch) if begins(t, every) else None

    return basis


def chosen(choose, rank, every, left):
    """The basis of ``subspace_adam`` from (gradient, rank, left) -> S."""

    def basis(t, gradient):
        return choose(gradient, rank, left) if begins(t, every) else None

    return basis


def scaling(n, r, whole):
    """‖N‖ / ‖R‖ of each column, or one of the whole matrix."""
    if whole:
        return np.linalg.norm(n) / (np.linalg.norm(r) + 1e-8)
    return np.linalg.norm(n, axis=0) / (np.linalg.norm(r, axis=0) + 1e-8)


def limited(x, previous, gamma):
    """X with a norm of at most γ times the previous one (0: none), and its norm."""
    if previous > 0:
        x = x / (max(np.linalg.norm(x) / (previous + 1e-8), gamma) / gamma)
    return x, np.linalg.norm(x)
