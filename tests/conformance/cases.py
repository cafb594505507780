"""One list of all public transformations, and what every conformance test shares."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flora_jax as fj
from tests.common import every_fold

# Width over rank is at most 4 (Folds) and 2 (Small): rho = 0.5**8 * 4, far from 0.5.
EVERY_K, RESAMPLE_EVERY = 3, 4
# Three cycles of accumulation and two transfers of momentum.
STEPS = 9

# Every argument that a setting names goes to the factories that know it.
FOLDS = {"rank": 4, "min_dim_size": 8, "min_dim_size_to_factor": 8}
SMALL = {"rank": 1, "min_dim_size": 2, "min_dim_size_to_factor": 2}


@dataclasses.dataclass(frozen=True)
class Case:
    """A public transformation with some choice of its options.

    Attributes:
      name: the test's id.
      factory: the function of flora_jax.
      options: its arguments, beside those of the setting.
      inner: None, or makes the inner transformation of the setting's arguments.
    """

    name: str
    factory: Callable[..., Any]
    options: Mapping[str, Any]
    inner: Callable[..., Any] | None = None

    def __hash__(self):
        return hash(self.name)

    def arguments(self, setting=FOLDS, **overrides):
        """The factory's arguments in a setting."""
        known = inspect.signature(self.factory).parameters
        chosen = {k: v for k, v in {**setting, **overrides}.items() if k in known}
        if self.inner is not None:
            chosen["inner"] = self.inner(setting["min_dim_size_to_factor"])
        return {**self.options, **chosen}

    def __call__(self, setting=FOLDS, **overrides):
        """The transformation in a setting."""
        return self.factory(**self.arguments(setting, **overrides))

    def takes(self, name):
        """Whether the factory has an argument of that name."""
        return name in inspect.signature(self.factory).parameters

    @property
    def sketches(self):
        """Whether some of its state is a sketch."""
        return self.takes("rank") and self.options.get("b1", 0.5) is not None


def _momentum(name, reading, projection):
    options = {
        "decay": 0.5,
        "resample_every": RESAMPLE_EVERY,
        "reading": reading,
        "projection": projection,
    }
    return Case(f"momentum-{name}", fj.compressed_momentum, options)


def _accumulation(name, projection, inner):
    options = {"every_k": EVERY_K, "projection": projection}
    return Case(f"accumulation-{name}", fj.compressed_accumulation, options, inner)


def _flora(name, **options):
    options = {"learning_rate": 0.1, "resample_every": RESAMPLE_EVERY, **options}
    return Case(f"flora-{name}", fj.flora, options)


CASES = (
    _momentum("paper-gaussian", "paper", fj.Gaussian()),
    _momentum("paper-countsketch", "paper", fj.CountSketch()),
    _momentum("interpolated-gaussian", "interpolated", fj.Gaussian()),
    _momentum("interpolated-countsketch", "interpolated", fj.CountSketch()),
    _momentum("residual-countsketch", "residual", fj.CountSketch()),
    _accumulation(
        "adafactor",
        fj.Gaussian(),
        lambda size: optax.adafactor(0.1, min_dim_size_to_factor=size),
    ),
    _accumulation("adam", fj.CountSketch(), lambda size: optax.adam(0.1)),
    _flora("momentum", b1=0.5),
    _flora("no-momentum", b1=None),
    _flora("weight-decay", b1=0.5, weight_decay=0.01, projection=fj.CountSketch()),
    Case("factored-rms", fj.scale_by_factored_rms, {}),
)
