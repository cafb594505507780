"""What state costs, and how much of it a budget buys."""

from flora_jax.memory._budget import rank_for_budget
from flora_jax.memory._memory_plan import LeafMemory, MemoryPlan, memory_plan
from flora_jax.memory._ranks import ranks_for_budget

__all__ = [
    "LeafMemory",
    "MemoryPlan",
    "memory_plan",
    "rank_for_budget",
    "ranks_for_budget",
]
