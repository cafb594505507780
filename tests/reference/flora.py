"""The whole FLORA optimizer on one leaf, in float64.

Adafactor (arXiv 1804.04235, Algorithm 4) with FLORA's Algorithm 2 (arXiv 2402.03293)
between its clipping and its relative step size, and decoupled weight decay.
"""

import numpy as np

from tests.reference.factored_rms import factored_rms
from tests.reference.momentum import sketched_momentum


def rms(x):
    return np.sqrt(np.mean(x**2))


def flora(
    weights,
    gradients,
    projection,
    learning_rate,
    decay=0.9,
    resample_every=1000,
    estimator="paper",
    left=False,
    clip=1.0,
    weight_decay=0.0,
):
    """Updates of all steps; each is added to the weights before the next.

    weights: a stack of matrices, which share the projection, the clipping and the
    parameter scale. gradients: one such stack per step. learning_rate: step -> number.
    """
    slices = [factored_rms(matrices) for matrices in zip(*gradients, strict=True)]
    clipped = [
        np.stack(stack) / max(1.0, rms(np.stack(stack)) / clip)
        for stack in zip(*slices, strict=True)
    ]
    slices = [
        sketched_momentum(matrices, projection, decay, resample_every, estimator, left)[
            0
        ]
        for matrices in zip(*clipped, strict=True)
    ]
    x, updates = np.asarray(weights, np.float64), []
    for t, stack in enumerate(zip(*slices, strict=True)):
        step = np.stack(stack) * max(1e-3, rms(x))
        updates.append(-learning_rate(t) * (step + weight_decay * x))
        x = x + updates[-1]
    return updates
