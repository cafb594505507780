"""GPT-2 and T5 in Flax NNX, written for reading.

`create` takes a model apart into a static part and a plain tree of arrays; losses,
decoding and checkpoints are functions of the two. The sizes come without jax, the
rest is imported when it is first used.
"""

import importlib
from typing import Any

from experiments.models.config import PUBLISHED, GPT2Config, T5Config, validate

_HOMES = {
    "abstract": "build",
    "beam": "decode",
    "create": "build",
    "greedy": "decode",
    "load": "hugging_face",
    "mean_loss": "build",
    "read_config": "hugging_face",
    "save": "hugging_face",
    "token_losses": "build",
}

__all__ = [
    "PUBLISHED",
    "GPT2Config",
    "T5Config",
    "abstract",
    "beam",
    "create",
    "greedy",
    "load",
    "mean_loss",
    "read_config",
    "save",
    "token_losses",
    "validate",
]


def __getattr__(name: str) -> Any:
    # Any other missing name must raise as in every module.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
