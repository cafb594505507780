"""A tiny job that has every part of the real one."""

from experiments.main_job.config import Config
from experiments.models.config import GPT2Config

UPDATES = 7

# Refreshes of the momentum's projection fall before and after the interruption.
TINY = Config(
    updates=UPDATES,
    batch_size=4,
    micro_batches=2,
    ranks=(16,),
    momentum=0.5,
    resample_every=3,
    estimator="paper",
    eval_every=3,
    eval_examples=6,  # a batch and a half
    model=GPT2Config(layers=1, width=128, heads=2, context=16, vocab_size=300),
)

SOURCE = '''"""Module number {i}."""

NAME = "naïve café {i} 漢字"


def add_{i}(x, y):
\t"""Adds {i}."""
    return x + y + {i}
'''
