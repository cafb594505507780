"""Adafactor's second moment (arXiv 1804.04235, Algorithms 4 and 7) in float64."""

import numpy as np


def factored_rms(gradients, decay_rate=0.8, epsilon=1e-30):
    """Gradients over the root of their second moment's estimate, at all steps.

    gradients: n x m matrices, whose moment is kept as its row and column sums, or
    arrays of another number of axes, whose moment is kept in full.
    """
    updates, rows, columns, full = [], 0.0, 0.0, 0.0
    for t, gradient in enumerate(gradients, start=1):
        g = np.asarray(gradient, np.float64)
        square = g**2 + epsilon
        beta = 1 - t**-decay_rate
        if g.ndim == 2:
            rows = beta * rows + (1 - beta) * square.sum(axis=1)
            columns = beta * columns + (1 - beta) * square.sum(axis=0)
            moment = np.outer(rows, columns) / rows.sum()
        else:
            moment = full = beta * full + (1 - beta) * square
        updates.append(g / np.sqrt(moment))
    return updates
