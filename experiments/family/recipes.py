"""The family of optimizers that are compared with one another, by name.

Each at the settings of its paper, but for what short trainings are too short for: the
interval between two bases, and the decay of the second moment, which is a setting.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

import flora_jax as fj
from experiments.common import lora
from experiments.common.optimizers import matrices_only
from experiments.common.state_bytes import tree_bytes
from experiments.models.build import Params


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is set from outside, besides the learning rate."""

    rank: int
    refresh_every: int
    """Updates between two bases, for those that renew theirs every few hundred."""
    seed: int
    """Of the projections."""
    b2: float
    """Decay of the second moment, for those that have Adam's."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Other arguments of the recipe, projections by the name of their class."""

    @property
    def sketch(self) -> dict[str, Any]:
        """Arguments that all recipes have in common."""
        options = dict(self.options)
        if "projection" in options:
            options["projection"] = _projection(options["projection"])
        return {
            "rank": self.rank,
            "key": self.seed,
            "mask": matrices_only,
            **options,
        }

    @property
    def moments(self) -> dict[str, Any]:
        """Arguments of those with Adam inside a subspace."""
        own = {"b2": self.b2, "refresh_every": self.refresh_every}
        return own | self.sketch

    @property
    def resampled(self) -> dict[str, Any]:
        """Arguments of those with a sketched momentum; the paper's, if not set."""
        paper = {"resample_every": self.refresh_every, "reading": "paper"}
        return paper | self.sketch


def _projection(name: str) -> fj.Projection:
    """Orthonormal rows where there is a choice."""
    kind = getattr(fj, name)
    if issubclass(kind, fj.AdaptiveProjection):
        return kind()
    return kind(scale="isometric")


@dataclasses.dataclass(frozen=True)
class Member:
    """One optimizer of the family; without weight decay, as all of them."""

    title: str
    make: Callable[[optax.ScalarOrSchedule, Setting], optax.GradientTransformation]
    ranked: bool = True
    """Whether it has a rank to choose."""


def matrices(tree: Params) -> Any:
    """Whether each leaf is one that the others sketch."""
    plans = fj.plan_leaves(tree, 1, mask=matrices_only)
    return jax.tree.map(
        lambda plan: plan.dense_reason is None,
        plans,
        is_leaf=lambda node: isinstance(node, fj.LeafPlan),
    )


def _muon(
    rate: optax.ScalarOrSchedule, setting: Setting
) -> optax.GradientTransformation:
    """Muon for the matrices that others sketch, Adam for all else, at one rate.

    Its update has the size of Adam's (consistent_rms = 0.2), as its authors advise
    where the two share a rate.
    """

    def specs(tree: Params) -> Any:
        axes = optax.contrib.MuonDimensionNumbers()
        return jax.tree.map(lambda own: axes if own else None, matrices(tree))

    tx = optax.contrib.muon(
        rate,
        adam_b2=setting.b2,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=specs,
    )
    return _coded(tx, setting)


def _coded(
    tx: optax.GradientTransformation, setting: Setting
) -> optax.GradientTransformation:
    dtype = setting.options.get("state_dtype")
    return tx if dtype is None else fj.quantize_state(tx, dtype)


_MUON_DECAY = 0.95


def _sketched_muon(setting: Setting) -> optax.GradientTransformation:
    """Muon's momentum with Nesterov's look ahead, as a sketch."""
    return fj.compressed_momentum(
        _MUON_DECAY,
        setting.rank,
        resample_every=setting.refresh_every,
        reading="interpolated",
        projection=_projection("CountSketch"),
        key=setting.seed,
        mask=matrices_only,
    )


def _flora_muon(setting: Setting) -> optax.GradientTransformation:
    """Muon's momentum in flora_adamw's subspace: the latter without second moments."""
    average = optax.trace(_MUON_DECAY, nesterov=setting.options.get("nesterov", True))
    return fj.scale_in_subspace(
        optax.chain(optax.scale(1 - _MUON_DECAY), average),
        _projection("CountSketch"),
        setting.rank,
        setting.refresh_every,
        transport="squared",
        residual="fira",
        limiter=1.01,
        key=setting.seed,
        mask=matrices_only,
    )


def _with_muons_step(
    momentum: Callable[[Setting], optax.GradientTransformation],
) -> Callable[[optax.ScalarOrSchedule, Setting], optax.GradientTransformation]:
    return lambda rate, setting: optax.chain(
        _coded(momentum(setting), setting),
        fj.orthogonalize(mask=matrices_only),
        optax.scale_by_learning_rate(rate),
    )


FAMILY = {
    "adamw": Member(
        "AdamW",
        lambda rate, s: optax.adamw(rate, b2=s.b2, weight_decay=0.0),
        ranked=False,
    ),
    "adamw_int8": Member(
        "AdamW, int8",
        lambda rate, s: fj.quantize_state(
            optax.adamw(rate, b2=s.b2, weight_decay=0.0), "int8"
        ),
        ranked=False,
    ),
    "adafactor": Member("Adafactor", lambda rate, s: optax.adafactor(rate), False),
    "adafactor_with_momentum": Member(
        "Adafactor + momentum",
        lambda rate, s: optax.adafactor(rate, momentum=0.9),
        ranked=False,
    ),
    "adamw_orthogonal": Member(
        "AdamW, orthogonalised",
        _with_muons_step(lambda s: optax.scale_by_adam(b2=s.b2)),
        ranked=False,
    ),
    "muon": Member("Muon", _muon, ranked=False),
    "sketched_muon": Member("Muon, sketched", _with_muons_step(_sketched_muon)),
    "flora_muon": Member("FLORA-Muon", _with_muons_step(_flora_muon)),
    "flora": Member("FLORA", lambda rate, s: fj.flora(rate, **s.resampled)),
    "galore": Member("GaLore", lambda rate, s: fj.galore(rate, **s.moments)),
    "fira": Member("Fira", lambda rate, s: fj.fira(rate, **s.moments)),
    "apollo": Member("APOLLO", lambda rate, s: fj.apollo(rate, **s.moments)),
    "apollo_mini": Member(
        "APOLLO-Mini",
        lambda rate, s: fj.apollo_mini(rate, **s.moments | {"rank": 1}),
        ranked=False,
    ),
    "dct_adamw": Member(
        "DCT-AdamW",
        lambda rate, s: fj.dct_adamw(rate, **s.moments | {"refresh_every": 1}),
    ),
    "flora_adamw": Member(
        "FLORA-AdamW", lambda rate, s: fj.flora_adamw(rate, **s.moments)
    ),
}


def measure(tx: optax.GradientTransformation, params: Params) -> tuple[int, int]:
    """Counts the bytes of a state, and those of the matrices alone; allocates nothing.

    Args:
        tx: the optimizer.
        params: what it trains, or the shapes.

    Returns:
        Bytes of the whole state, and of the state for the matrices alone: those that
        may be sketched, or LoRA's adapters in their place.
    """
    chosen = jax.tree.leaves(matrices(params))
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for (path, leaf), own in zip(
            jax.tree_util.tree_leaves_with_path(params), chosen, strict=True
        )
        if own or path[-1].key in lora.ADAPTERS
    }
    whole, part = (jax.eval_shape(tx.init, tree) for tree in (params, flat))
    return tree_bytes(whole), tree_bytes(part)
