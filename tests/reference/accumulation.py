"""FLORA's Algorithm 1 (arXiv 2402.03293) in float64, with every matrix formed."""

import numpy as np


def sketched_accumulation(gradients, projection, every_k, mean=True, left=False):
    """What the base optimizer receives (None within a cycle), and the last sketch.

    gradients: n x m matrices, one per micro-step. projection: cycle -> S, r x m.
    every_k: cycle -> micro-steps. left: sketch the rows, by way of the transposes.
    """
    estimates, cycle, i, total = [], 0, 0, 0.0
    for gradient in gradients:
        g = np.asarray(gradient, np.float64)
        s = projection(cycle)
        total = total + (g.T if left else g) @ s.T
        i += 1
        sketch = total / i if mean else total
        estimates.append(None)
        if i == every_k(cycle):
            estimates[-1] = s.T @ sketch.T if left else sketch @ s
            cycle, i, total, sketch = cycle + 1, 0, 0.0, 0.0 * sketch
    return estimates, sketch.T if left else sketch
