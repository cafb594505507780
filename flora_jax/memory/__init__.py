"""What state costs, and how much of it a budget buys."""

from flora_jax.memory.budget import rank_for_budget, tree_bytes
from flora_jax.memory.planner import (
    LeafMemory,
    MemoryPlan,
    default_peers,
    memory_plan,
)
from flora_jax.memory.ranks import ranks_for_budget
from flora_jax.memory.tables import format_bytes

__all__ = [
    "LeafMemory",
    "MemoryPlan",
    "default_peers",
    "format_bytes",
    "memory_plan",
    "rank_for_budget",
    "ranks_for_budget",
    "tree_bytes",
]
