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
from experiments.config import Config
from experiments.models.build import Params
from experiments.optimizers import matrices_only
from experiments.state_bytes import leaf_plans, tree_bytes


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

    @property
    def sketch(self) -> dict[str, Any]:
        """Arguments that all recipes have in common."""
        return {"rank": self.rank, "key": self.seed, "mask": matrices_only}

    @property
    def moments(self) -> dict[str, Any]:
        """Arguments of those with Adam inside a subspace."""
        return self.sketch | {"b2": self.b2, "refresh_every": self.refresh_every}


@dataclasses.dataclass(frozen=True)
class Member:
    """One optimizer of the family; without weight decay, as all of them."""

    title: str
    make: Callable[[optax.ScalarOrSchedule, Setting], optax.GradientTransformation]
    ranked: bool = True
    """Whether it has a rank to choose."""


def _adamw_with_scale(
    rate: optax.ScalarOrSchedule, setting: Setting
) -> optax.GradientTransformation:
    """AdamW with GaLore's factor for the matrices and no subspace."""

    def matrices(tree: Params) -> Any:
        plans = fj.plan_leaves(tree, setting.rank, mask=matrices_only)
        return jax.tree.map(
            lambda plan: plan.dense_reason is None,
            plans,
            is_leaf=lambda node: isinstance(node, fj.LeafPlan),
        )

    adamw = optax.adamw(rate, b2=setting.b2, weight_decay=0.0)
    return optax.chain(adamw, optax.masked(optax.scale(0.25), matrices))


_RANDOMIZED = fj.TopSVD(method="randomized")

FAMILY = {
    "adamw": Member(
        "AdamW",
        lambda rate, s: optax.adamw(rate, b2=s.b2, weight_decay=0.0),
        ranked=False,
    ),
    "adamw_scaled": Member(
        "AdamW, matrices at a quarter of the rate", _adamw_with_scale, ranked=False
    ),
    "adafactor": Member("Adafactor", lambda rate, s: optax.adafactor(rate), False),
    "adafactor_with_momentum": Member(
        "Adafactor + momentum",
        lambda rate, s: optax.adafactor(rate, momentum=0.9),
        ranked=False,
    ),
    "flora": Member(
        "FLORA",
        lambda rate, s: fj.flora(rate, resample_every=s.refresh_every, **s.sketch),
    ),
    "galore": Member("GaLore", lambda rate, s: fj.galore(rate, **s.moments)),
    "galore_randomized": Member(
        "GaLore, randomized SVD",
        lambda rate, s: fj.galore(rate, projection=_RANDOMIZED, **s.moments),
    ),
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
    "dct_adamw_interval": Member(
        "DCT-AdamW, renewed at intervals",
        lambda rate, s: fj.dct_adamw(rate, **s.moments),
    ),
    "flora_adamw": Member(
        "FLORA-AdamW", lambda rate, s: fj.flora_adamw(rate, **s.moments)
    ),
    "flora_adamw_int8": Member(
        "FLORA-AdamW, int8",
        lambda rate, s: fj.flora_adamw(rate, state_dtype="int8", **s.moments),
    ),
}


def measure(
    tx: optax.GradientTransformation, config: Config, params: Params
) -> tuple[int, int]:
    """Counts the bytes of a state, and those of the matrices alone; allocates nothing.

    Args:
        tx: the optimizer.
        config: says which parameters are matrices that may be compressed.
        params: parameters, or their shapes.

    Returns:
        Bytes of the whole state, and of the state for those matrices alone.
    """
    pairs = zip(leaf_plans(config, params), jax.tree.leaves(params), strict=True)
    matrices = {plan.path: leaf for plan, leaf in pairs if plan.dense_reason is None}
    whole, part = (jax.eval_shape(tx.init, tree) for tree in (params, matrices))
    return tree_bytes(whole), tree_bytes(part)
