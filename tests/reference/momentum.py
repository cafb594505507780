"""FLORA's Algorithm 2 (arXiv 2402.03293) in float64, with every matrix formed."""

import numpy as np


def sketched_momentum(
    gradients, projection, decay, resample_every, estimator="paper", left=False
):
    """Updates of all steps, and the momentum as the next one finds it, of one matrix.

    gradients: n x m matrices. projection: epoch -> S, r x m. left: sketch the rows, by
    running the algorithm on the transposes. resample_every: None for never.
    """
    updates, momentum = [], 0.0
    for t, gradient in enumerate(gradients):
        g = np.asarray(gradient, np.float64)
        g = g.T if left else g
        epoch = t // resample_every if resample_every else 0
        s = projection(epoch)
        if t > 0 and resample_every and t % resample_every == 0:
            momentum = momentum @ (projection(epoch - 1) @ s.T)
        old, momentum = momentum, decay * momentum + (1 - decay) * (g @ s.T)
        update = {"paper": _paper, "nesterov": _nesterov, "residual": _residual}
        if estimator == "fresh":
            u = decay * (old @ s if t else 0.0) + (1 - decay) * g
        else:
            u = update[estimator](momentum, s, g, decay)
        updates.append(u.T if left else u)
    steps = len(gradients)
    if resample_every and steps % resample_every == 0:
        epoch = steps // resample_every
        momentum = momentum @ (projection(epoch - 1) @ projection(epoch).T)
    return updates, momentum.T if left else momentum


def _paper(momentum, s, g, decay):
    return momentum @ s


def _nesterov(momentum, s, g, decay):
    return decay * (momentum @ s) + (1 - decay) * g


def _residual(momentum, s, g, decay):
    inverse = np.linalg.inv(s @ s.T)
    seen = s.T @ inverse @ s
    return momentum @ inverse @ s + g @ (np.eye(len(seen)) - seen)
