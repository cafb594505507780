"""How Adam's moments follow a change of basis, in float64, with every matrix formed."""

import numpy as np


def transported(rule, c, m, v, b1, b2, t, width, sketch=None, left=True):
    """Both moments in the new basis.

    rule: of ``RULES``. c: S_new S_oldᵀ. m, v: moments before bias correction, of
    R = S G, or of R = G Sᵀ if not left. t: number of updates that are in them, at least
    1. width: number of columns of S. sketch: this step's R in the new basis, which
    "reset" takes.
    """
    if not left:
        m, v, sketch = m.T, v.T, None if sketch is None else sketch.T
    m, v = RULES[rule](c, m, v, b1, b2, t, width, sketch)
    return (m, v) if left else (m.T, v.T)


def _keep(c, m, v, b1, b2, t, width, sketch):
    """GaLore's (arXiv 2403.03507): the numbers stay, whatever their basis is now."""
    return m, v


def _reset(c, m, v, b1, b2, t, width, sketch):
    """R and R², less bias: the next update is then Adam's first one."""
    return (1 - b1**t) * sketch, (1 - b2**t) * sketch**2


def _squared(c, m, v, b1, b2, t, width, sketch):
    """The first moment is linear; variances of independent entries add up."""
    return c @ m, c**2 @ v


def _rms(c, m, v, b1, b2, t, width, sketch):
    """An average of second moments, and first moments of unchanged expected size."""
    sums = (c**2).sum(axis=1, keepdims=True)
    # A new direction that is orthogonal to all old ones has no history.
    share = np.divide(c**2, sums, out=np.zeros_like(c), where=sums > 0)
    return np.sqrt(width / len(c)) * (c @ m), share @ v


def _ldadam(c, m, v, b1, b2, t, width, sketch):
    """LDAdam's (arXiv 2410.16103): variances about the mean are moved, not squares."""
    mean = m / (1 - b1**t)
    variance = v / (1 - b2**t) - mean**2
    return c @ m, (1 - b2**t) * np.abs(c**2 @ variance + (c @ mean) ** 2)


RULES = {
    "keep": _keep,
    "reset": _reset,
    "squared": _squared,
    "rms": _rms,
    "ldadam": _ldadam,
}
