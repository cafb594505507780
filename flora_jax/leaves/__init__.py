"""From the leaves of a tree to matrices, and the trees of state kept for them."""

from flora_jax.leaves.boxes import is_box, is_masked, unboxed
from flora_jax.leaves.layout import fit_names, fit_sharding
from flora_jax.leaves.masks import embeddings, not_embeddings
from flora_jax.leaves.mesh import (
    is_sharded,
    replicated,
    replicated_along,
    sharded_along,
    varying,
)
from flora_jax.leaves.moments import (
    FIRST,
    KINDS,
    SECOND,
    SUM,
    find_moments,
    map_moments,
    replace_moments,
)
from flora_jax.leaves.owners import StateLeaf, abstract_state, state_leaves
from flora_jax.leaves.paths import named_arrays, named_leaves, normalise_path
from flora_jax.leaves.plan import LeafPlan
from flora_jax.leaves.rules import ByPath, LeafRules, by_path, is_scalar
from flora_jax.leaves.spec import describe, make_spec, spec_identity, verify_state
from flora_jax.leaves.trees import (
    cast_like,
    matching_leaves,
    rebuild,
    run_sharded,
    zeros_tree,
)

__all__ = [
    "FIRST",
    "KINDS",
    "SECOND",
    "SUM",
    "ByPath",
    "LeafPlan",
    "LeafRules",
    "StateLeaf",
    "abstract_state",
    "by_path",
    "cast_like",
    "describe",
    "embeddings",
    "find_moments",
    "fit_names",
    "fit_sharding",
    "is_box",
    "is_masked",
    "is_scalar",
    "is_sharded",
    "make_spec",
    "map_moments",
    "matching_leaves",
    "named_arrays",
    "named_leaves",
    "normalise_path",
    "not_embeddings",
    "rebuild",
    "replace_moments",
    "replicated",
    "replicated_along",
    "run_sharded",
    "sharded_along",
    "spec_identity",
    "state_leaves",
    "unboxed",
    "varying",
    "verify_state",
    "zeros_tree",
]
