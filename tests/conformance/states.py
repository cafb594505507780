"""What the states of this package hold, and where they stand inside of others."""

import jax

import flora_jax as fj

# The parameter-shaped trees of each state, and the counters beside them.
TREES = {
    fj.CompressedMomentumState: ("momentum",),
    fj.CompressedAccumulationState: ("acc_grads",),
    fj.FactoredRmsState: ("v_row", "v_col", "v"),
    fj.SubspaceState: (
        "inner.mu",
        "inner.nu",
        "inner.trace",
        "basis",
        "limiter",
        "error",
    ),
    fj.QuantizedState: ("scales",),
}
# Those that hold sketches.
SKETCHES = ("momentum", "acc_grads", "inner.mu", "inner.nu", "inner.trace")
COUNTERS = {
    fj.CompressedMomentumState: ("count",),
    fj.CompressedAccumulationState: ("mini_step", "gradient_step"),
    fj.FactoredRmsState: ("count",),
    fj.SubspaceState: ("count",),
    fj.QuantizedState: ("count",),
}
# Where each keeps the state of the transformation inside of it.
INNER = {
    fj.CompressedAccumulationState: "inner_opt_state",
    fj.SubspaceState: "inner",
    fj.QuantizedState: "inner",
}


def own_states(state):
    """All states of this package inside a state."""

    def is_own(x):
        return type(x) in TREES

    found = [x for x in jax.tree.leaves(state, is_leaf=is_own) if is_own(x)]
    nested = [
        own_states(getattr(x, INNER[type(x)])) if type(x) in INNER else []
        for x in found
    ]
    pairs = zip(found, nested, strict=True)
    return [x for own, states in pairs for x in (own, *states)]


def own_trees(state):
    """(name, tree) of each parameter-shaped tree of this package inside a state."""
    return [
        (f"{type(own).__name__}.{field}", tree)
        for own in own_states(state)
        for field in TREES[type(own)]
        for tree in _trees(field, _found(field, own))
    ]


def _found(field, own):
    """What is in a field, or () where the state or what is inside has none."""
    for name in field.split("."):
        own = getattr(own, name, ())
    return own


def _trees(field, value):
    """The trees in a field: one, none where it is (), or one for each tree of codes."""
    trees = value if field == "scales" else (value,)
    return [tree for tree in trees if not (isinstance(tree, tuple) and not tree)]
